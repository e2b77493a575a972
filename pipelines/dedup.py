"""Which texts of a corpus are there already: equal ones by a hash, similar ones by MinHash and its bands.

Texts of all data sets of the corpus are compared, in their normal form; of each group of duplicates the first one
stays. Of the task's training rows, those with the same source and target are. What is left out for another reason, as a
row that is held out, is no duplicate of anything. Signatures are written piece by piece, and compared band by band: no
task and no process holds all of them.
Source: Broder 1997, "On the resemblance and containment of documents"; Lee et al. 2022, arXiv:2107.06499.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.documents import document_key, text_key, unread_path
from pipelines.encode import Encode
from pipelines.listing import UnreadableFile
from yan_core.files import atomic_folder, write_file

PERMUTATIONS = 128
"""Hash values of a MinHash signature."""

NGRAM = 5
"""Words of a shingle."""


def bands_of(threshold: float) -> tuple[int, int]:
    """Bands and values a band, so that texts of this similarity share a band about every second time."""
    fits = [(abs((1 / (PERMUTATIONS // r)) ** (1 / r) - threshold), PERMUTATIONS // r, r) for r in range(1, 65)]
    return min(fits)[1:]


def shingles(text: str) -> set[bytes]:
    """The word 5-grams of a text, or all its words where it has fewer."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + NGRAM]).encode() for i in range(max(1, len(words) - NGRAM + 1))}


def band_keys(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Keys of each text's bands, uint64, [texts, bands]: texts that share one are near-duplicates."""
    from datasketch import MinHash

    bands, width = bands_of(threshold)
    signatures = MinHash.bulk((shingles(t) for t in texts), num_perm=PERMUTATIONS)
    values = np.stack([s.hashvalues for s in signatures])[:, : bands * width].reshape(len(texts), bands, width)
    keys = np.full((len(texts), bands), 0xCBF29CE484222325, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(width):
            keys = (keys ^ values[:, :, i].astype(np.uint64)) * np.uint64(0x100000001B3)
            keys ^= keys >> np.uint64(29)
    return keys


@dataclass(frozen=True)
class Sign:
    """Writes the signatures of a piece's texts."""

    encode: Encode

    def path(self, number: int) -> Path:
        """Where they are: `rows`, the rows' numbers, and `keys`, [rows, 1 + bands]."""
        return self.encode.folder / "signatures" / f"{self.encode.name}-{number:06d}"

    def __call__(self, number: int) -> None:
        """Do a piece, unless it is done."""
        path, config = self.path(number), self.encode.data.clean
        unread = unread_path(self.encode.folder, self.encode.name, number)
        if path.is_dir() and not unread.is_file():
            return
        unread.unlink(missing_ok=True)
        near = config.near_threshold if config.duplicates == "near" and self.encode.task is None else None
        key_of = document_key if self.encode.task is None else text_key
        rows, keys = [], []
        try:
            for batch in self.encode.source.rows(self.encode.source.pieces[number]):
                read = ((n, self._text(row)) for n, row in zip(batch.numbers, batch.rows, strict=True))
                texts = {n: text for n, text in read if text}
                if texts:
                    rows += list(texts)
                    keys.append(signatures(list(texts.values()), key_of, near))
        except UnreadableFile as error:
            write_file(unread, str(error))  # the encoding sets the file aside
        with atomic_folder(path) as folder:
            np.save(folder / "rows.npy", np.array(rows, np.int64))
            np.save(folder / "keys.npy", np.concatenate(keys) if keys else np.zeros((0, 1), np.uint64))

    def _text(self, row: dict[str, Any]) -> str:
        """What a row is compared by; empty where it is unusable or left out, which its encoding tells."""
        try:
            if self.encode.task is None:
                text, reason = self.encode.plain(row)
            else:
                _, source, target, reason = self.encode.pair(row)
                text = f"{source}\0{target}"
        except ValueError:
            return ""
        return "" if reason else text


def signatures(texts: Sequence[str], key_of: Callable[[str], int], near_threshold: float | None) -> np.ndarray:
    """Keys of texts, uint64, [texts, 1 + bands]: that of the whole text, and those of its bands where asked."""
    exact = np.array([[key_of(t)] for t in texts], np.uint64)
    return exact if near_threshold is None else np.hstack([exact, band_keys(texts, near_threshold)])


def pairs_of(paths: Sequence[Path], column: int) -> np.ndarray:
    """Texts that share a key in one column of the signatures, with the first one that has it.

    Args:
        paths: Signatures of all pieces, in order.
        column: Which key.

    Returns:
        Numbers of texts over all pieces, int64, [pairs, 2].
    """
    found = [np.load(path / "keys.npy", mmap_mode="r") for path in paths]
    keys = np.concatenate([k[:, column] if k.shape[1] > column else np.zeros(0, np.uint64) for k in found])
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(keys) else np.zeros(0, bool)
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))]
    return np.stack([first, order], 1)[~new]


def duplicates(pairs: np.ndarray, count: int) -> np.ndarray:
    """Texts that are not the first of their group, sorted; groups are what pairs [pairs, 2] connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, group = connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)
    return np.setdiff1d(np.arange(count), first)


def mark_duplicates(signs: Sequence[Sign], compare: Callable[[list[Path], int], list[np.ndarray]]) -> int:
    """Leave the numbers of each piece's duplicate rows in files, from its signatures.

    Args:
        signs: Of all data sets of the corpus, in order; their pieces are signed.
        compare: (signatures, number of columns) -> `pairs_of` each column, computed wherever.

    Returns:
        How many there are.
    """
    pieces = [(sign, number) for sign in signs for number in range(len(sign.encode.source.pieces))]
    paths = [sign.path(number) for sign, number in pieces]
    rows = [np.load(path / "rows.npy") for path in paths]
    columns = max(np.load(path / "keys.npy", mmap_mode="r").shape[1] for path in paths)
    pairs = np.concatenate(compare(paths, columns))
    ends = np.cumsum([len(r) for r in rows])
    dropped = duplicates(pairs, int(ends[-1])) if len(pairs) else np.zeros(0, np.int64)
    for (sign, number), end, own in zip(pieces, ends.tolist(), rows, strict=True):
        inside = dropped[(dropped >= end - len(own)) & (dropped < end)] - (end - len(own))
        if len(inside):
            path = sign.encode.duplicates_path(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, own[inside])
    return len(dropped)
