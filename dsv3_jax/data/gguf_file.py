"""Reads GGUF files (github.com/ggml-org/ggml, docs/gguf.md): metadata at once, tensors one by one."""

import dataclasses
import math
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from dsv3_jax.config import ConfigError

SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """`metadata`: Python scalars and strings, lists of strings, numpy arrays. `shapes`: of each tensor, slowest axis
    first, as `tensor` returns it."""

    path: pathlib.Path
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    _types: dict[str, gguf.GGMLQuantizationType]
    _data: dict[str, np.ndarray]

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32. Raises `ConfigError` for a type that the `gguf` package cannot read."""
        kind = self._types[name]
        try:
            return gguf.quants.dequantize(self._data[name], kind).astype(np.float32).reshape(self.shapes[name])
        except NotImplementedError:
            raise ConfigError(
                f"{self.path}: tensor {name} is of type {kind.name}, which the gguf package does not dequantise; "
                "use a file of another type, as Q8_0 or F16"
            ) from None


class _Cursor:
    """Reads forward through the bytes of a file; a read past the end raises ValueError."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, size: int) -> np.ndarray:
        if size > len(self.data) - self.at:
            raise ValueError(f"ends at byte {len(self.data)}, where {size} more are expected after byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)).tobytes())[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).tobytes().decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.number("<I"), self.number("<Q")
            if element in SCALARS:
                dtype = np.dtype(SCALARS[element])
                return self.take(count * dtype.itemsize).view(dtype)
            return [self.value(element) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"has a metadata value of unknown type {kind}")
        return self.take(np.dtype(SCALARS[kind]).itemsize).view(SCALARS[kind])[0].item()


def open_gguf(path: str | pathlib.Path) -> GgufFile:
    """Reads the header of a file and maps its tensors, which are read when asked for.

    Raises:
      ConfigError: there is no such file; it is not GGUF, of another version or byte order, or truncated.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"--gguf={path}: no such file; expected a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"--gguf={path}: is not a GGUF file (it does not begin with 'GGUF')")
    try:
        return _parse(path, _Cursor(np.memmap(path, np.uint8, "r")))
    except (ValueError, UnicodeDecodeError, KeyError) as error:
        raise ConfigError(f"--gguf={path}: is truncated or damaged ({error}); fetch it again") from None


def _parse(path: pathlib.Path, cursor: _Cursor) -> GgufFile:
    cursor.take(4)
    version = cursor.number("<I")
    if version not in VERSIONS:
        raise ConfigError(
            f"--gguf={path}: is GGUF version {version}, or of the other byte order; "
            f"versions {' and '.join(map(str, VERSIONS))}, little-endian, are read"
        )
    num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
    metadata, shapes, types, starts = {}, {}, {}, {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<I"))
    for _ in range(num_tensors):
        name = cursor.string()
        shapes[name] = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
        types[name] = gguf.GGMLQuantizationType(cursor.number("<I"))
        starts[name] = cursor.number("<Q")
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    begin = -(-cursor.at // alignment) * alignment
    data = {}
    for name, shape in shapes.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        if math.prod(shape[-1:]) % block:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} are not whole blocks of {block}")
        cursor.at = min(begin + starts[name], len(cursor.data))
        stored = cursor.take(math.prod(shape) // block * block_bytes)
        # Rows of bytes, as `gguf.quants.dequantize` takes them.
        data[name] = stored.reshape(*shape[:-1], -1)
    return GgufFile(path, metadata, shapes, types, data)
