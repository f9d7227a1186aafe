"""Files of `torch.save` that hold a dict of tensors: their places are found without loading, their bytes read in place.

Such a file is a zip archive: a pickle that describes the tensors, and the uncompressed bytes of each storage. torch
reads the pickle, with `weights_only=True` and without the storages; no code in the file runs.
"""

from __future__ import annotations

import io
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from corda_convert.checkpoint.byte_file import ByteFile, Extent
from corda_convert.checkpoint.safetensors_file import MAX_HEADER_BYTES
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorSpec, dtype_name
from corda_convert.errors import InputNotFound, MalformedFile, UnsupportedInput, some

if TYPE_CHECKING:
    import torch

GATHER_BYTES = 1 << 16
"""A tensor that does not lie in one piece is gathered from stretches of the file of at most this length."""

_LOCAL_HEADER_BYTES = 30
_FOLDER_MARK = 0x10


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in the file: absolute byte offset of its first element, shape, and strides in elements."""

    spec: TensorSpec
    begin: int
    strides: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return DTYPE_BITS[self.spec.dtype] // 8

    @property
    def span_bytes(self) -> int:
        """From the first byte of its storage that it uses to behind the last."""
        return _span(self.spec.shape, self.strides) * self.item_bytes

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.spec.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.spec.elements == 0
            expected *= size
        return True


class PickleFile(ByteFile):
    """A dict of tensors written by `torch.save`. Implements `ExtentFile`.

    Attributes:
        aliases: tensors that are others under a second name (the same bytes and shape): later name → first name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata: dict[str, str] = {}
        self._placed = _read_places(path)
        self.specs = {name: placed.spec for name, placed in self._placed.items()}
        self.aliases = _find_aliases(self._placed)

    def extent(self, name: str) -> Extent | None:
        placed = self._placed[name]
        return Extent(placed.begin, placed.spec.nbytes) if placed.is_contiguous else None

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        placed = self._placed[name]
        if begin + len(view) > placed.spec.nbytes:
            raise ValueError(f"{name}: {begin} + {len(view)} is past its {placed.spec.nbytes} bytes")
        if not len(view):
            return
        if placed.is_contiguous:
            self.read_bytes_into(placed.begin + begin, view)
        else:
            self._gather(placed, begin, view)

    def _gather(self, placed: Placed, begin: int, view: memoryview) -> None:
        """Row-major bytes of a tensor with other strides: whole boxes of its index space, one after the other."""
        import torch

        size = placed.item_bytes
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        position = 0
        for offset, shape, strides in _boxes(placed.spec.shape, placed.strides, begin // size, len(view) // size):
            elements = torch.Size(shape).numel()
            part = view[position : position + elements * size]
            target = torch.frombuffer(part, dtype=integers).view(shape)
            self._gather_box(placed.begin + offset * size, target, strides)
            position += elements * size

    def _gather_box(self, begin: int, target: torch.Tensor, strides: tuple[int, ...]) -> None:
        import torch

        size = target.element_size()
        span = _span(tuple(target.shape), strides)
        if span * size <= GATHER_BYTES:
            buffer = bytearray(span * size)
            self.read_bytes_into(begin, memoryview(buffer))
            target.copy_(torch.frombuffer(buffer, dtype=target.dtype).as_strided(target.shape, strides))
            return
        reach = [(length - 1) * stride for length, stride in zip(target.shape, strides, strict=True)]
        dim = reach.index(max(reach))
        half = target.shape[dim] // 2
        self._gather_box(begin, target.narrow(dim, 0, half), strides)
        rest = target.narrow(dim, half, target.shape[dim] - half)
        self._gather_box(begin + half * strides[dim] * size, rest, strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to behind the last of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class _Box(NamedTuple):
    """A part of a strided tensor: its first element's place in the storage, its shape and strides, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _boxes(shape: tuple[int, ...], strides: tuple[int, ...], begin: int, count: int) -> list[_Box]:
    """Cuts `count` elements from `begin` on, in row-major order, into boxes."""
    if count == 0:
        return []
    if not shape:
        return [_Box(0, (), ())]
    row = 1
    for size in shape[1:]:
        row *= size
    first, skipped = divmod(begin, row)
    boxes: list[_Box] = []
    if skipped:
        head = min(row - skipped, count)
        inner = _boxes(shape[1:], strides[1:], skipped, head)
        boxes += [box._replace(offset=first * strides[0] + box.offset) for box in inner]
        first, count = first + 1, count - head
    rows, tail = divmod(count, row)
    if rows:
        boxes.append(_Box(first * strides[0], (rows, *shape[1:]), strides))
    if tail:
        inner = _boxes(shape[1:], strides[1:], 0, tail)
        boxes += [box._replace(offset=(first + rows) * strides[0] + box.offset) for box in inner]
    return boxes


def _find_aliases(placed: dict[str, Placed]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, place in placed.items():
        if place.spec.nbytes == 0:
            continue
        owner = first.setdefault((place.begin, place.spec.dtype, place.spec.shape, place.strides), name)
        if owner != name:
            aliases[name] = owner
    return aliases


def _read_places(path: Path) -> dict[str, Placed]:
    if not path.is_file():
        raise InputNotFound(f"No such file: {path}")
    try:
        skeleton, storages = _read_archive(path)
        tensors = _load_without_data(skeleton)
    except MalformedFile:
        raise
    except Exception as error:  # on damaged bytes the unpickler raises anything
        raise _unsafe(path, next(iter(str(error).splitlines()), type(error).__name__)) from None
    _check_tensors(path, tensors)
    return {name: _place(path, name, tensor, storages) for name, tensor in tensors.items()}


def _place(path: Path, name: str, tensor: torch.Tensor, storages: dict[int, Extent]) -> Placed:
    offset = tensor.untyped_storage()._checkpoint_offset
    assert offset is not None  # noqa: S101 - `_is_plain` has seen it
    storage = storages.get(offset, Extent(0, 0))
    first = tensor.storage_offset() * tensor.element_size()
    spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
    strides = tuple(int(stride) for stride in tensor.stride())
    placed = Placed(spec, storage.begin + int(first), strides)
    if spec.nbytes and first + placed.span_bytes > storage.nbytes:
        raise MalformedFile(
            f"{path}: {name} needs {first + placed.span_bytes:,} bytes of its storage, which has {storage.nbytes:,}.",
            why="The file is damaged.",
            next_step="Get the file again from where it came.",
        )
    declared = int(tensor.untyped_storage().nbytes())
    if storage.nbytes != declared:
        raise MalformedFile(
            f"{path}: the storage of {name} has {storage.nbytes:,} bytes; its description says {declared:,}.",
            why="The file is damaged.",
            next_step="Get the file again from where it came.",
        )
    return placed


def _read_archive(path: Path) -> tuple[io.BytesIO, dict[int, Extent]]:
    """The archive in memory with every storage emptied, and where in the file the storage at each of its offsets lies."""
    if not zipfile.is_zipfile(path):
        raise _unsafe(path, "it is no zip archive, which torch.save writes since torch 1.6")
    skeleton = io.BytesIO()
    places: dict[str, Extent] = {}
    described = 0
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream, zipfile.ZipFile(skeleton, "w") as emptied:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise _unsafe(path, "two of its records have the same name")
        for name, entry in entries.items():
            record = name.partition("/")[2]
            if record.startswith("data/"):
                places[name] = _data_extent(path, stream, entry)
                emptied.writestr(name, b"")
            elif record != ".format_version":  # with it, torch guesses offsets from sizes
                described += entry.file_size
                if described > MAX_HEADER_BYTES:
                    raise _unsafe(path, f"its record {name} has {entry.file_size:,} bytes")
                content = archive.read(entry)
                if b"\nbytearray\n" in content:  # of any length that it says
                    raise _unsafe(path, "it holds a bytearray")
                emptied.writestr(name, content)
        if any(archive.read(name) != sys.byteorder.encode() for name in entries if name.endswith("/byteorder")):
            raise MalformedFile(f"{path} was written on a machine with another byte order.")
    with zipfile.ZipFile(skeleton) as emptied:
        storages = {
            _data_extent(path, skeleton, entry).begin: places[entry.filename]
            for entry in emptied.infolist()
            if entry.filename in places
        }
    skeleton.seek(0)
    return skeleton, storages


def _data_extent(path: Path, stream: BinaryIO, entry: zipfile.ZipInfo) -> Extent:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise MalformedFile(f"{path} is compressed.", next_step="Save it again with torch.save.")
    if entry.external_attr & _FOLDER_MARK:
        raise _unsafe(path, f"{entry.filename} is marked as a folder, of which torch reads no numbers")
    stream.seek(entry.header_offset)
    local = stream.read(_LOCAL_HEADER_BYTES)
    if local[:4] != b"PK\x03\x04":
        raise MalformedFile(f"{path} is damaged: {entry.filename} does not begin where its index says.")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return Extent(entry.header_offset + _LOCAL_HEADER_BYTES + lengths, entry.file_size)


def _load_without_data(skeleton: io.BytesIO) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch's documented way to read metadata alone

    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        return torch.load(skeleton, weights_only=True)


def _check_tensors(path: Path, loaded: Any) -> None:
    import torch

    if not isinstance(loaded, dict):
        raise MalformedFile(f"{path} holds a {type(loaded).__name__}, not a dict of tensors.")
    nested = [str(name) for name, value in loaded.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedInput(
            f"{path} holds its tensors inside {some(nested)}, not in one plain dict.",
            why="It is a checkpoint of a training, which holds more than the model.",
            next_step="Save the model's own dict of tensors: "
            f'torch.save(torch.load(..., weights_only=True)["{nested[0]}"], ...)',
        )
    strangers = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise MalformedFile(f"{path} holds values that are not tensors: {some(strangers)}.")
    unnamed = [str(name) for name in loaded if not isinstance(name, str)]
    if unnamed:
        raise MalformedFile(f"{path} holds tensors whose names are no text: {some(unnamed)}.")
    odd = [name for name, value in loaded.items() if not _is_plain(value)]
    if odd:
        raise MalformedFile(f"{path} holds tensors that are sparse, quantized or of an unknown dtype: {some(odd)}.")


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    try:
        dtype_name(tensor.dtype)
    except KeyError:
        return False
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None) is not None


def _unsafe(path: Path, reason: str) -> MalformedFile:
    return MalformedFile(
        f"{path} is not a file of plain tensors that can be loaded safely: {reason}",
        why="It is truncated, of the old pickle format, or holds Python objects, which could run code.",
        next_step="Save it again as a plain dict of tensors, or as safetensors.",
    )
