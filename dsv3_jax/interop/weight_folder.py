"""Weights as memory-mapped files in a run's folder, and the conversion of a published checkpoint into them.

`WORKDIR/weights/` holds a `.npy` file a leaf, `manifest.json` (the leaves' shapes and dtypes, and what they are made
from), `journal.txt` (the tensors that are in place) and, when all are, `finished`.
"""

import json
import math
import mmap
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.huggingface import CONFIG, Opened, copy_tensors

FOLDER = "weights"
MANIFEST, JOURNAL, FINISHED = "manifest.json", "journal.txt", "finished"
# Pages written or read are given back after this much, or a quarter of the largest file if that is less.
HELD_BYTES = 64_000_000


class WeightFolder:
    """The weights of one folder. `leaves`: path -> shape and dtype."""

    def __init__(self, workdir: str | pathlib.Path):
        self.path = pathlib.Path(workdir) / FOLDER
        manifest = json.loads((self.path / MANIFEST).read_text())
        self.source: dict[str, Any] = manifest["source"]
        self.leaves = {
            path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for path, leaf in manifest["leaves"].items()
        }
        self._maps: dict[str, np.memmap] = {}

    @property
    def finished(self) -> bool:
        """Whether every tensor is in place."""
        return (self.path / FINISHED).exists()

    def open(self, mode: str) -> dict[str, np.ndarray]:
        """The leaves, mapped: mode "r" to read, "r+" to fill."""
        for path in self.leaves:
            self._maps[path] = np.lib.format.open_memmap(_file(self.path, path), mode=mode)  # pyright: ignore
        return {path: np.asarray(self._maps[path]).view(leaf.dtype) for path, leaf in self.leaves.items()}

    def release(self) -> None:
        """Writes changed pages to disk and gives up the memory of all pages; they are read again when needed."""
        for mapped in self._maps.values():
            mapped.flush()
            buffer = mapped.base
            if isinstance(buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                buffer.madvise(mmap.MADV_DONTNEED)

    def done(self) -> set[str]:
        """Names of the tensors that are in place. A last line that was cut short does not count."""
        journal = self.path / JOURNAL
        return set(journal.read_text().rpartition("\n")[0].splitlines()) if journal.exists() else set()

    def resume(self) -> set[str]:
        """`done`; a last line that was cut short is taken away, so that `record` does not write behind it."""
        journal = self.path / JOURNAL
        if journal.exists():
            os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
        return self.done()

    def record(self, names: list[str]) -> None:
        """Adds tensors to the journal; call `release` before."""
        with (self.path / JOURNAL).open("a") as journal:
            journal.write("".join(f"{name}\n" for name in names))
            journal.flush()
            os.fsync(journal.fileno())


def has_weights(workdir: str | pathlib.Path) -> bool:
    """Whether the folder holds converted weights, finished or not."""
    return (pathlib.Path(workdir) / FOLDER / MANIFEST).is_file()


def open_weights(workdir: str | pathlib.Path) -> WeightFolder:
    """Converted weights. Raises `ConfigError` if the conversion has not been finished."""
    folder = WeightFolder(workdir)
    if not folder.finished:
        raise ConfigError(
            f"{workdir}: its conversion was interrupted; go on with experiments/convert.py "
            f"--from_hf={folder.source['directory']} --workdir={workdir}"
        )
    return folder


def _file(folder: pathlib.Path, path: str) -> pathlib.Path:
    return folder / f"{path.replace('/', '.')}.npy"


def _name(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"


def _allocate(path: pathlib.Path, leaf: jax.ShapeDtypeStruct) -> None:
    """A file of zeros. Its space is claimed now: a disk that fills up under a mapping kills the process."""
    dtype = np.dtype(leaf.dtype)
    stored = dtype if dtype.isbuiltin == 1 else np.dtype(f"V{dtype.itemsize}")  # .npy knows no bfloat16
    np.lib.format.open_memmap(path, mode="w+", dtype=stored, shape=tuple(leaf.shape)).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _begin(workdir: pathlib.Path, leaves: dict[str, jax.ShapeDtypeStruct], source: dict[str, Any]) -> WeightFolder:
    """A new folder of zeros, or the one of an interrupted conversion of the same source."""
    if has_weights(workdir):
        folder = WeightFolder(workdir)
        if folder.source != source:
            raise ConfigError(
                f"--workdir={workdir}: holds weights from {folder.source['directory']} (or its files have changed); "
                "use another folder"
            )
        for path in sorted(folder.leaves.keys() | leaves.keys()):
            theirs, ours = folder.leaves.get(path), leaves.get(path)
            if theirs != ours:
                raise ConfigError(
                    f"--workdir={workdir}: holds {path} as {_name(theirs)}, this conversion makes it {_name(ours)}; "
                    "give the --dtype of the first time, or use another folder"
                )
        return folder
    if workdir.exists() and any(p for p in workdir.iterdir() if p.name != FOLDER):
        raise ConfigError(f"--workdir={workdir}: is not empty and holds no converted weights; use another folder")
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(f"--workdir={workdir}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    for path, leaf in leaves.items():
        _allocate(_file(folder, path), leaf)
    listed = {path: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name} for path, x in leaves.items()}
    _write(folder / MANIFEST, json.dumps({"source": source, "leaves": listed}, indent=1))
    return WeightFolder(workdir)


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def begin_conversion(opened: Opened, directory: str | pathlib.Path, workdir: str | pathlib.Path) -> WeightFolder:
    """A folder of zeros for a published checkpoint, or the one of an interrupted conversion of the same files.

    Raises:
      ConfigError: the folder holds something else, or the disk has no room for it.
    """
    directory, workdir = pathlib.Path(directory), pathlib.Path(workdir)
    files = sorted({stored.file for stored in opened.stored.values()} | {directory / CONFIG})
    return _begin(
        workdir,
        opened.leaves,
        {
            "directory": str(directory.resolve()),
            "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        },
    )


def fill(folder: WeightFolder, opened: Opened, show: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Copies the tensors that are not in place yet; may be interrupted at any time.

    Beside the process itself it holds one tensor, its place, and `HELD_BYTES` of pages: less than twice the largest
    file, unless one tensor is most of that file.

    Args:
      show: called first and now and then with the bytes of the checkpoint that are done, and their total.
    """
    done = folder.resume() & {tensor.name for tensor in opened.table}
    sizes = {tensor.name: opened.stored[tensor.name].nbytes for tensor in opened.table}
    count, total = sum(sizes[name] for name in done), sum(sizes.values())
    show(count, total)
    for batch in _batches(copy_tensors(opened, folder.open("r+"), done), _held_bytes(opened)):
        folder.release()
        folder.record([tensor.name for tensor, _ in batch])
        count += sum(nbytes for _, nbytes in batch)
        show(count, total)
    (folder.path / FINISHED).touch()


def _held_bytes(opened: Opened) -> int:
    largest = max(file.stat().st_size for file in {stored.file for stored in opened.stored.values()})
    return min(HELD_BYTES, largest // 4)


def _batches(copied: Iterator[tuple[Any, int]], limit: int) -> Iterator[list[tuple[Any, int]]]:
    """Groups of tensors of `limit` bytes or just more."""
    batch, size = [], 0
    for tensor, nbytes in copied:
        batch.append((tensor, nbytes))
        size += nbytes
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
