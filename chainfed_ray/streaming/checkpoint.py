"""Reads a safetensors checkpoint by byte ranges, into memory that this process owns.

Files are never memory-mapped: the pages of a mapping stay resident, and count against a client's budget. A matrix that is
quantized (``block_forms.py``) looks like one of float32 numbers, which are computed as its blocks are read.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainfed_ray.block_forms import FORMS, from_metadata
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.reading import LFS_POINTER, reading_from
from chainfed_ray.streaming.dequantize import AT_ONCE, dequantizing_bytes, to_values

_LONGEST_HEADER = 100_000_000  # bytes, as safetensors' own reader has it
DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Range(NamedTuple):
    file: int  # file descriptor
    start: int  # byte offset in the file
    size: int  # bytes


class _Entry(NamedTuple):
    ranges: tuple[_Range, ...]  # where the tensor's bytes are, in their order
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str | None = None  # of its blocks, if it is quantized: then the dtype is that of the values


class Checkpoint:
    """The tensors of the checkpoint in ``folder``: one ``model.safetensors``, or shards with an index.

    Raises:
        UnsupportedModel: the folder has no such file, or its bytes are not a safetensors file.
        OSError: the disk does not work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        self._files: list[int] = []
        self._bytes_read, self._counting = 0, Lock()
        try:
            for path in shards(folder):
                self._open(path)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> frozenset[str]:
        """The names of the tensors."""
        return frozenset(self._entries)

    @property
    def bytes_read(self) -> int:
        """The bytes of tensors that were read so far."""
        return self._bytes_read

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor. Floating-point tensors are cast to ``dtype``, others keep theirs."""
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=dtype if entry.form else entry.dtype)
        self._fill(tensor, entry, 0)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def rows(self, name: str, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [N, D] of a table [V, D] at ``indices`` [N], cast to ``dtype``. No other row is read.

        Raises:
            IndexError: an index is outside the table.
        """
        entry = self._entries[name]
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < entry.shape[0]):
            raise IndexError(f"a row of {name} outside 0 … {entry.shape[0] - 1}")
        stored = self.stored_bytes(name) // entry.shape[0]  # of a row
        rows = torch.empty((len(indices), stored), dtype=torch.uint8)
        for row, index in zip(rows, indices.tolist(), strict=True):
            self._read(row, entry, index * stored)
        shape = (len(indices), *entry.shape[1:])
        if entry.form is None:
            return rows.view(entry.dtype).view(shape).to(dtype)
        table = torch.empty(shape, dtype=dtype)
        to_values(entry.form, rows.view(-1), table.view(-1))
        return table

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the checkpoint; of one that is quantized, float32."""
        return self._entries[name].dtype

    def form(self, name: str) -> str | None:
        """The form of a tensor's blocks if it is quantized, such as ``Q4_0``."""
        return self._entries[name].form

    def stored_bytes(self, name: str) -> int:
        """The bytes of a tensor in the checkpoint's files."""
        return sum(place.size for place in self._entries[name].ranges)

    def loaded_bytes(self, name: str, dtype: torch.dtype) -> int:
        """The bytes of a tensor once it is loaded as ``dtype``."""
        return math.prod(self.shape(name)) * dtype.itemsize

    def conversion_bytes(self, name: str, dtype: torch.dtype) -> int:
        """The bytes that are held beside a tensor while it is read as ``dtype``."""
        if form := self.form(name):
            return dequantizing_bytes(form)
        return 0 if self.dtype(name) == dtype else self.stored_bytes(name)

    def row_bytes(self, name: str) -> int:
        """The bytes of one row of a matrix in its dtype."""
        return math.prod(self.shape(name)[1:]) * self.dtype(name).itemsize

    def slice(self, name: str, first: int, count: int, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``first`` … ``first + count - 1`` of a matrix [N, K], as [count, K] in ``dtype``.

        They are read into ``buffer``, a tensor of bytes with room for them in the checkpoint's dtype, and in ``dtype``. The
        result is a view of it; or a copy if ``dtype`` is not the checkpoint's, and the matrix not quantized.
        """
        entry = self._entries[name]
        shape, read = (count, *entry.shape[1:]), dtype if entry.form else entry.dtype
        rows = buffer[: math.prod(shape) * read.itemsize].view(read).view(shape)
        self._fill(rows, entry, first * math.prod(shape[1:]))
        return rows.to(dtype)

    def join(self, name: str, parts: Sequence[str], shape: tuple[int, ...]) -> None:
        """Call the numbers of several tensors, one after the other, a tensor ``name`` of this ``shape``.

        Raises:
            UnsupportedModel: the tensors have several dtypes or forms, or another number of elements.
        """
        entries = [self._entries[part] for part in parts]
        found = sum(math.prod(entry.shape) for entry in entries)
        if len({(entry.dtype, entry.form) for entry in entries}) > 1 or found != math.prod(shape):
            wanted = f"{name} has the shape {list(shape)}, and its {len(parts)} parts in the checkpoint do not fill it"
            raise UnsupportedModel(str(self.folder), wanted)
        ranges = tuple(place for entry in entries for place in entry.ranges)
        self._entries[name] = entries[0]._replace(ranges=ranges, shape=shape)

    def matrix(self, name: str, index: int) -> str:
        """The name of one matrix [N, K] of a tensor [E, N, K]."""
        one, count = f"{name}[{index}]", self._entries[name].shape[0]
        if one not in self._entries:
            self.cut(one, name, index, count, self._entries[name].shape[1:])
        return one

    def cut(self, name: str, source: str, place: int, count: int, shape: tuple[int, ...]) -> None:
        """Call one of ``count`` equal shares of a tensor's numbers a tensor ``name`` of this ``shape``.

        Raises:
            UnsupportedModel: a share has another number of elements.
        """
        whole, size = self._entries[source], self.stored_bytes(source) // count
        if math.prod(shape) * count != math.prod(whole.shape):
            wanted = f"{name} has the shape {list(shape)}, which is not one of {count} shares of {list(whole.shape)}"
            raise UnsupportedModel(str(self.folder), wanted)
        self._entries[name] = whole._replace(ranges=tuple(_within(whole.ranges, place * size, size)), shape=shape)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def _open(self, path: Path) -> None:

        def refusal(error: Exception) -> UnsupportedModel:
            if isinstance(error, OSError):
                return UnsupportedModel(str(path), f"{path.name} cannot be read ({error.strerror})")
            reason = f"{error}" if type(error) is ValueError else f"has a broken header ({error!r})"
            return UnsupportedModel(str(path), f"{path.name} {reason}")

        with reading_from(str(path), refusal):
            if not path.is_file():  # to open a pipe would wait for whoever writes into it
                raise ValueError("is no file" if path.exists() else "is missing")
            self._files.append(file := os.open(path, os.O_RDONLY))
            start, header = _header(file)
            forms = from_metadata(header.pop("__metadata__", {}))
            tensors = {name: _tensor(name, item) for name, item in header.items()}
            _check_places(tensors, os.fstat(file).st_size - start)
        for name, (dtype, shape, begin, end) in tensors.items():
            if name in self._entries:
                raise UnsupportedModel(
                    str(path), f"{path.name} has {name}, which an earlier file of its index has as well"
                )
            place = _Range(file, start + begin, end - begin)
            entry = _Entry((place,), shape, dtype)
            if name in forms:
                block, (*above, bytes_of_row) = FORMS[forms[name]], entry.shape
                blocks = (*above, bytes_of_row // block.bytes * block.values)
                entry = _Entry((place,), blocks, torch.float32, forms[name])
            self._entries[name] = entry

    def _fill(self, tensor: Tensor, entry: _Entry, first: int) -> None:
        """Read the elements of ``tensor`` from the element ``first`` of an entry on."""
        if entry.form is None:
            self._read(tensor.view(-1).view(torch.uint8), entry, first * tensor.itemsize)
            return
        block = FORMS[entry.form]
        for values in tensor.view(-1).split(AT_ONCE):
            blocks = torch.empty(len(values) // block.values * block.bytes, dtype=torch.uint8)
            self._read(blocks, entry, first // block.values * block.bytes)
            to_values(entry.form, blocks, values)
            first += len(values)

    def _read(self, room: Tensor, entry: _Entry, start: int) -> None:
        """Read bytes into ``room`` from the byte ``start`` of an entry on."""
        view = memoryview(room.numpy().data) if room.numel() else memoryview(b"")
        for file, first, size in _within(entry.ranges, start, len(view)):
            self._read_into(view[:size], file, first)
            view = view[size:]

    def _read_into(self, view: memoryview, file: int, start: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(file, [view[done:]], start + done)
            if count == 0:
                raise UnsupportedModel(str(self.folder), "the checkpoint got shorter while it was being read")
            done += count
        with self._counting:
            self._bytes_read += done


class _Tensor(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # its bytes, counted from the end of the header
    end: int


def _header(file: int) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and what its header says of them.

    Raises:
        ValueError: the file has no such header; with the rest of a sentence about it.
    """
    size, begin = os.fstat(file).st_size, os.pread(file, max(len(LFS_POINTER), 8), 0)
    if begin.startswith(LFS_POINTER):
        raise ValueError("is a pointer of git-lfs (`git lfs pull` fetches the file)")
    length = int.from_bytes(begin[:8], "little")
    if size < 8 or length > size - 8:
        raise ValueError("is truncated: its header is longer than the file")
    if length > _LONGEST_HEADER:
        raise ValueError(f"is no safetensors file: its header has {length} bytes, and {_LONGEST_HEADER} are the most")
    try:
        header = json.loads(os.pread(file, length, 8))
    except (ValueError, RecursionError):
        raise ValueError("is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("is no safetensors file: its header is not an object")
    return 8 + length, header


def _tensor(name: str, item: Any) -> _Tensor:
    """What a header says of a tensor.

    Raises:
        ValueError: it is not a tensor that can be read.
        Exception: it is not what a header has.
    """
    begin, end = item["data_offsets"]
    shape = tuple(item["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"has a shape and offsets of {name} that are not counts")
    if item["dtype"] not in DTYPES:
        raise ValueError(f"has {name} in the dtype {item['dtype']}, which is not supported")
    return _Tensor(DTYPES[item["dtype"]], shape, begin, end)


def _check_places(tensors: dict[str, _Tensor], size: int) -> None:
    """Check that the tensors follow one another, as the format has them, and fill the ``size`` bytes after the header.

    Raises:
        ValueError: they do not, so what would be read are other numbers.
    """
    for name, (dtype, shape, begin, end) in tensors.items():
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"has {end - begin} bytes for {name}, which does not fit its shape {list(shape)} and dtype"
            )
        if end > size:
            raise ValueError(f"is truncated: {name} ends beyond the file")
    in_order = sorted((begin, end) for _, _, begin, end in tensors.values())
    if any(before[1] != after[0] for before, after in pairwise([(0, 0), *in_order, (size, size)])):
        raise ValueError("has tensors that overlap, or bytes that are of no tensor")


def _within(ranges: tuple[_Range, ...], start: int, size: int) -> Iterator[_Range]:
    """The parts of ``ranges`` that hold ``size`` bytes, from the byte ``start`` of all of them on."""
    for file, first, length in ranges:
        if start < length and size > 0:
            part = min(length - start, size)
            yield _Range(file, first + start, part)
            size -= part
        start = max(start - length, 0)


def _no_index(file: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{file.name} cannot be read ({error.strerror})"
    return f"{file.name} is not the index of a checkpoint"


def shards(folder: Path) -> list[Path]:
    """The files of the checkpoint in ``folder``. They need not be there.

    Raises:
        UnsupportedModel: the folder has no checkpoint, or one with a broken index.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        with reading_from(str(index), lambda error: UnsupportedModel(str(folder), _no_index(index, error))):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            elsewhere = [name for name in names if Path(name).name != name or name in ("", "..")]
        if elsewhere:
            raise UnsupportedModel(str(folder), f"its index names {elsewhere[0]!r}, which is no file of this folder")
        return [folder / name for name in names]
    raise UnsupportedModel(str(folder), "it has neither model.safetensors nor model.safetensors.index.json")
