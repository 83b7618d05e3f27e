"""Safetensors files, one tensor at a time: everything a header says is checked before any tensor is read."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT8 = np.dtype(jnp.float8_e4m3fn)
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": FLOAT8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """Where a tensor lies: `offset` is in bytes from the start of the file."""

    file: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor as it is stored."""
        return np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
      ConfigError: no such file, not safetensors, shorter or longer than its header says, or a dtype we do not read.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, but the checkpoint's index names it; complete the download")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if size < 8 or start > size:
            raise ConfigError(f"{path}: {size} bytes, not a whole safetensors file (truncated?); copy it again")
        try:
            entries = json.loads(file.read(length))
        except ValueError:
            raise ConfigError(f"{path}: not a safetensors file (its header is no JSON)") from None
    entries.pop("__metadata__", None)
    tensors, end = {}, start
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: tensor {name} is {entry['dtype']}; we read {', '.join(DTYPES)}")
        begin, stop = entry["data_offsets"]
        tensors[name] = stored = Stored(path, start + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if stop - begin != stored.nbytes:
            raise ConfigError(f"{path}: tensor {name} of shape {stored.shape} takes {stop - begin} bytes: corrupt")
        end = max(end, start + stop)
    if end != size:
        raise ConfigError(f"{path}: {size} bytes, its header describes {end} (truncated?); copy it again")
    return tensors


def open_directory(directory: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a checkpoint of one file, or of many with an index.

    Raises:
      ConfigError: no checkpoint there, a file or tensor of the index that is missing, one tensor in two files, or what
        `read_header` raises.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            where = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{index}: not an index of safetensors files (no weight_map)") from None
    elif (directory / SINGLE).is_file():
        where = dict.fromkeys(read_header(directory / SINGLE), SINGLE)
    else:
        raise ConfigError(f"{directory}: holds neither {SINGLE} nor {INDEX}; expected a Hugging Face checkpoint")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        header = read_header(directory / file)
        twice = tensors.keys() & header.keys()
        if twice:
            raise ConfigError(f"{directory}: tensor {min(twice)} is in {file} and in {tensors[min(twice)].file.name}")
        tensors |= header
    missing = where.keys() - tensors.keys()
    if missing:
        raise ConfigError(f"{directory}: tensor {min(missing)} of {INDEX} is not in {where[min(missing)]}")
    return tensors


def dequantize(quantized_OI: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Weights stored as float8 times one float32 scale a block of `block` rows × columns, edges included.

    The layout of the published DeepSeek-V3 weights (arXiv:2412.19437, section 3.3). Works a row of blocks at a time.
    """
    rows, columns = block
    result_OI = np.empty(quantized_OI.shape, dtype)
    for index, scale_of_row in enumerate(scale):
        part = slice(index * rows, (index + 1) * rows)
        scale_I = np.repeat(scale_of_row, columns)[: quantized_OI.shape[1]]
        result_OI[part] = quantized_OI[part].astype(np.float32) * scale_I
    return result_OI


class Layout(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(layouts: Iterable[Layout], max_shard_bytes: int) -> list[list[Layout]]:
    """Cuts a sequence into files of at most `max_shard_bytes`; a larger tensor has a file to itself."""
    shards, size = [[]], 0
    for layout in layouts:
        if shards[-1] and size + layout.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(layout)
        size += layout.nbytes
    return shards


def write_shards(directory: pathlib.Path, shards: list[list[Layout]], values: Iterator[np.ndarray]) -> None:
    """Writes `values`, in the order of the shards, a tensor at a time; and an index if there are several files.

    A file has its name only when it is whole.
    """
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        temporary = directory / f"{file}.part"
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in shard:
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with temporary.open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for layout in shard:
                value = np.ascontiguousarray(next(values), layout.dtype)
                assert value.shape == layout.shape, f"{layout.name}: {value.shape} is not {layout.shape}"
                value.tofile(out)
        os.replace(temporary, directory / file)
    if len(files) > 1:
        total = sum(layout.nbytes for shard in shards for layout in shard)
        where = {layout.name: file for file, shard in zip(files, shards, strict=True) for layout in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)
        (directory / INDEX).write_text(text + "\n")
