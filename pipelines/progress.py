"""Lines of progress on the driver's terminal."""


def say(line: str) -> None:
    """Show a line of progress."""
    print(line, flush=True)
