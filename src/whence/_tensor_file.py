"""Files of arrays in the safetensors format, written and memory-mapped with numpy alone.

    8 bytes     length of the header, little-endian
    header      JSON: name -> dtype, shape, first and last byte; padded with spaces to a multiple of 8
    arrays      one after the other, little-endian, rows first; the widest dtypes first, so that all are aligned

Any safetensors library opens them. The one for numpy copies what it reads, knows no bfloat16, and may lay bytes out
otherwise in another version, which would change the checksums of equal arrays. A tensor here is a pair of its dtype in
the names of safetensors and its array; numpy has no bfloat16, so that of a ``BF16`` one is its bits in uint16.
"""

import json
import mmap
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt16
from numpy import ndarray

DTYPE_OF = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
"""Name in safetensors to that in numpy."""

_CODE_OF = {np.dtype(name): code for code, name in DTYPE_OF.items() if code != "BF16"}

Tensor = tuple[str, ndarray]


def code_of(dtype: np.dtype) -> str | None:
    """Name a dtype of numpy as safetensors does; None where it has no such thing."""
    return _CODE_OF.get(dtype.newbyteorder("<"))


def pack(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Lay tensors out as a file; the same tensors are the same bytes."""
    header, pieces, end = {}, [], 0
    for name in sorted(tensors, key=lambda name: (-np.dtype(DTYPE_OF[tensors[name][0]]).itemsize, name)):
        code, array = tensors[name]
        array = np.ascontiguousarray(array, DTYPE_OF[code]).reshape(array.shape)
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        pieces.append(array.reshape(-1).view(np.uint8).data)
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Map all arrays of a file into memory, without a copy; it costs a file handle for as long as one of them lives.

    Raises OSError or ValueError where the file does not hold them whole.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    if not isinstance(header, dict):
        raise ValueError("its header is no table of arrays")
    tensors = {}
    for name, entry in header.items():
        code, shape, first = entry["dtype"], entry["shape"], entry["data_offsets"][0]
        tensors[name] = code, np.frombuffer(mapped, DTYPE_OF[code], prod(shape), start + first).reshape(shape)
    return tensors


def to_bfloat16(values: Float32[ndarray, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """Round to the nearest bfloat16, ties to even, as bits; what is beyond the largest becomes infinite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Half of the last bit kept, less one unless that bit is odd: a tie then carries over only where it ends even.
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)  # the carry could turn a NaN into a number


def from_bfloat16(bits: UInt16[ndarray, "*shape"]) -> Float32[ndarray, "*shape"]:
    """Give bfloat16 bits as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
