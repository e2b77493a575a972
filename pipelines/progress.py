"""Lines on the driver's terminal."""

from __future__ import annotations

from collections.abc import Sequence


def say(line: str) -> None:
    """Show a line of progress."""
    print(line, flush=True)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with the cells of each column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
