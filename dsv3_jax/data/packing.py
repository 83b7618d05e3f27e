"""Packing as a deterministic index: rows of documents, with random access, over flat token files.

A stored document is BOS, its tokens, EOS. Its inputs are all but the last token and its targets all but the first, cut
into pieces of at most `length`; full pieces are rows of their own, the rest is packed best-fit. Every target of every
document stands in exactly one row.
"""

import bisect
import dataclasses
import pathlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Documents of one domain and split, one after another: tokens (a memory map), and offsets of length documents + 1.
    `text_bytes`: UTF-8 bytes of the documents."""

    tokens: np.ndarray
    offsets: np.ndarray
    text_bytes: int

    @staticmethod
    def write(folder: pathlib.Path, documents: list[np.ndarray], text_bytes: int) -> None:
        """Writes `tokens.npy` (uint16 if ids allow, else uint32) and `offsets.npy` into a new folder."""
        folder.mkdir(parents=True)
        flat = np.concatenate(documents)
        np.save(folder / "tokens.npy", flat.astype(np.uint16 if flat.max() < 2**16 else np.uint32))
        np.save(folder / "offsets.npy", np.cumsum([0] + [len(d) for d in documents]).astype(np.int64))
        np.save(folder / "text_bytes.npy", np.int64(text_bytes))

    @staticmethod
    def read(folder: pathlib.Path) -> "TokenFile":
        """Opens what `write` left."""
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        return TokenFile(tokens, np.load(folder / "offsets.npy"), int(np.load(folder / "text_bytes.npy")))


class PackedRows:
    """Rows of `length` positions over a `TokenFile`. A random-access source for Grain.

    Row i is a dict of int32 arrays [length]: `tokens`, `targets`, `positions` (from 0 in each piece, and again on
    padding), `segment_ids` (1, 2, 3 … a piece, 0 on padding; targets count where it is above 0) and `domain`, the same
    number in all rows of one file.
    """

    def __init__(self, file: TokenFile, length: int, max_segments: int, domain: int = 0):
        self._file, self._length, self._domain = file, length, domain
        self._row_offsets, self._starts, self._lengths = pack(file.offsets, length, max_segments)

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    def __repr__(self) -> str:
        return f"PackedRows({len(self)} rows of {self._length})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = {name: np.zeros(self._length, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
        at = 0
        pieces = range(self._row_offsets[index], self._row_offsets[index + 1])
        for segment, piece in enumerate(pieces, 1):
            start, length = self._starts[piece], self._lengths[piece]
            span, stored = slice(at, at + length), self._file.tokens[start : start + length + 1]
            row["tokens"][span], row["targets"][span] = stored[:-1], stored[1:]
            row["positions"][span], row["segment_ids"][span] = np.arange(length), segment
            at += length
        row["positions"][at:] = np.arange(self._length - at)
        row["domain"] = np.full(self._length, self._domain, np.int32)
        return row


def pack(offsets: np.ndarray, length: int, max_segments: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row offsets into pieces, and each piece's start in the token file and number of inputs."""
    rows: list[list[tuple[int, int]]] = []
    rests: list[tuple[int, int]] = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        inputs = end - start - 1
        for at in range(start, start + inputs - length + 1, length):
            rows.append([(at, length)])
        if inputs % length:
            rests.append((start + inputs - inputs % length, inputs % length))
    # Best fit, longest first: `open_rows` is sorted by room left; a full row leaves it.
    open_rows: list[tuple[int, int]] = []
    for piece in sorted(rests, key=lambda piece: (-piece[1], piece[0])):
        at = bisect.bisect_left(open_rows, (piece[1], -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if room > piece[1] and len(rows[row]) < max_segments:
            bisect.insort(open_rows, (room - piece[1], row))
    row_offsets = np.cumsum([0] + [len(row) for row in rows])
    pieces = np.asarray([piece for row in rows for piece in row], np.int64).reshape(-1, 2)
    return row_offsets, pieces[:, 0], pieces[:, 1]
