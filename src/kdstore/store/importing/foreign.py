"""Arrays out of files that anybody may have written: nothing is unpickled, and what a header declares is compared with what is there before it is allocated."""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from kdstore.errors import SourceError

MAX_SAMPLE_BYTES = 1 << 26  # of the features of one image: 15 times those of 30 views of DataCompDR
_SAFETENSORS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class NpyFile:
    """A .npy file of floats, read row by row."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows `start:stop`; raises SourceError for a file that was cut meanwhile."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            with open(self.path, "rb") as f:
                content = os.pread(f.fileno(), (stop - start) * row_bytes, self.offset + start * row_bytes)
        except OSError as e:
            raise SourceError(f"Cannot read {self.path}: {e.strerror}.", "Restore the file.") from e
        if len(content) != (stop - start) * row_bytes:
            raise SourceError(f"{self.path} ends within row {start + len(content) // row_bytes}.", "Restore the file.")
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])


def open_npy(path: Path, ndim: int) -> NpyFile:
    """Read the header of a .npy file of `ndim` axes; raises SourceError unless it holds plain floats, as many as the file has bytes for."""
    try:
        with open(path, "rb") as f:
            shape, dtype = _npy_header(f)
            offset, size = f.tell(), os.fstat(f.fileno()).st_size
    except OSError as e:
        raise SourceError(f"Cannot read {path}: {e.strerror}.", "Restore the file.") from e
    except ValueError as e:
        raise SourceError(f"{path} cannot be imported: {e}.", "Save it again as a plain array of floats.") from e
    if len(shape) != ndim or offset + math.prod(shape) * dtype.itemsize != size:
        raise SourceError(f"{path} has {size} bytes, and its header says {dtype} {list(shape)}; expected {ndim} axes.", "Restore the file.")
    return NpyFile(path, shape, dtype, offset)


def npz_arrays(content: bytes, names: Sequence[str]) -> Arrays:
    """Return arrays of floats of an .npz file; raises ValueError."""
    with _as_value_error(), zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = {}
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            refuse_large(member.file_size)
            inner = io.BytesIO(archive.read(member))  # no more than it declares
            shape, dtype = _npy_header(inner)
            rest = inner.getbuffer()[inner.tell() :]
            if len(rest) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} holds {len(rest)} bytes, and its header says {dtype} {list(shape)}")
            found[name] = np.frombuffer(rest, dtype).reshape(shape)
        return found


def safetensors_arrays(content: bytes) -> Arrays:
    """Return the tensors of floats of a safetensors file, bfloat16 as float32; raises ValueError."""
    with _as_value_error():
        found = {}
        for name, said in deserialize(content):
            if said["dtype"] in _SAFETENSORS:
                values = np.frombuffer(said["data"], _SAFETENSORS[said["dtype"]]).reshape(said["shape"])
                found[name] = (values.astype(np.uint32) << 16).view(np.float32) if said["dtype"] == "BF16" else values
        return found


def gunzipped(content: bytes) -> bytes:
    """Unpack one gzip stream; raises ValueError if it holds more than MAX_SAMPLE_BYTES."""
    with _as_value_error():
        inflate = zlib.decompressobj(wbits=31)
        unpacked = inflate.decompress(content, MAX_SAMPLE_BYTES + 1)
        refuse_large(len(unpacked))
        if not inflate.eof:
            raise ValueError("its gzip stream is cut")
        return unpacked


def refuse_large(size: int) -> None:
    """Raise ValueError for more bytes than the features of one image take."""
    if size > MAX_SAMPLE_BYTES:
        raise ValueError(f"it declares {size} bytes, and one image may have {MAX_SAMPLE_BYTES}")


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and dtype; raises ValueError for what is no C-ordered array of floats."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it is of version {version[0]}.{version[1]} of NumPy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"it holds {dtype}, not float16, float32 or float64")
    if (fortran and len(shape) > 1) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("its rows do not lie one after the other")
    return shape, dtype


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, SafetensorError, LookupError, EOFError, NotImplementedError, RuntimeError, OSError, OverflowError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from e
