"""Files of text → records, read one at a time where the format allows it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from corda_convert.errors import CordaConvertError, MalformedFile, UnsupportedInput

_PIECE_CHARACTERS = 1 << 16
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

KINDS = (".jsonl", ".json", ".txt", ".parquet")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file.

    Attributes:
        place: file and line or row, for messages.
        value: its text, or its fields.
    """

    place: str
    value: str | Mapping[str, Any]


class _Records(Sequence[Record]):
    """Records that are made when they are asked for."""

    @abstractmethod
    def _at(self, index: int) -> Record:
        """The record of this number, from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        numbers = range(len(self))[index]
        return self._at(numbers) if isinstance(numbers, int) else [self._at(number) for number in numbers]


class JsonLines(_Records):
    """The lines of a .jsonl file that are not blank; each is parsed when it is asked for."""

    def __init__(self, path: Path) -> None:
        lines = _read_bytes(path).removeprefix(_UTF8_MARK).split(b"\n")
        self._path = path
        self._lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def _at(self, index: int) -> Record:
        number, line = self._lines[index]
        place = f"{self._path}, line {number}"
        try:
            value = json.loads(decoded(line, place))
        except (ValueError, RecursionError) as error:
            raise MalformedFile(f"{place} is no JSON: {error}.") from None
        return Record(place, _checked(value, place))


class Rows(_Records):
    """The rows of a table (an Arrow table, a data set), each converted when it is asked for."""

    def __init__(self, name: str, table: Any) -> None:
        self._name, self._table = name, table

    def __len__(self) -> int:
        return len(self._table)

    def _at(self, index: int) -> Record:
        row = self._table[index] if not hasattr(self._table, "slice") else self._table.slice(index, 1).to_pylist()[0]
        return Record(f"{self._name}, row {index}", row)


def read_records(path: Path, *, pieces: bool) -> Sequence[Record]:
    """The records of one file; the file's ending says its format.

    Of a .txt file they are its lines; with `pieces`, the text as it stands, cut at line ends into pieces of 65,536 characters
    or a little more. Raises `MalformedFile` for what cannot be read and `UnsupportedInput` for other endings.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return JsonLines(path)
    if kind == ".json":
        return _read_json(path)
    if kind == ".txt":
        text = decoded(_read_bytes(path).removeprefix(_UTF8_MARK), str(path))
        if pieces:
            return [Record(str(path), piece) for piece in _cut(text)]
        return [Record(f"{path}, line {n}", line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if kind == ".parquet":
        return _read_parquet(path)
    raise UnsupportedInput(
        f"{path} is no file of text that is known by its ending.", next_step=f"Known: {' '.join(KINDS)}"
    )


def read_whole_text(path: Path) -> str | None:
    """All of a .txt file; None for a file of records."""
    if path.suffix.lower() != ".txt":
        return None
    return decoded(_read_bytes(path).removeprefix(_UTF8_MARK), str(path))


def decoded(content: bytes, place: str) -> str:
    """UTF-8 text. Raises `MalformedFile` naming the first byte that is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        where = f"{place}, line {line + 1}" if line else place
        encoding = "utf-16" if content[:2] in _UTF16_MARKS else "latin1"
        raise MalformedFile(
            f"{where}: byte 0x{content[error.start]:02x} (at {error.start:,}) is not UTF-8.",
            next_step=f"Convert the file first, as with: iconv -f {encoding} -t utf-8",
        ) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MalformedFile(f"{path} cannot be read: {error.strerror}.") from None


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS) + 1
        end = end or len(text)
        yield text[start:end]
        start = end


def _read_json(path: Path) -> Sequence[Record]:
    """A list of records, or an object with one list in it; a .json file of several lines of JSON is read as .jsonl."""
    content = _read_bytes(path).removeprefix(_UTF8_MARK)
    try:
        value = json.loads(decoded(content, str(path)))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return JsonLines(path)
        raise MalformedFile(f"{path} is no JSON: {error}.") from None
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if isinstance(inner, list)]
        if len(lists) != 1:
            return [Record(str(path), value)]
        value = value[lists[0]]
    if not isinstance(value, list):
        raise MalformedFile(f"{path} holds {kind_of(value)}, not a list of records.")
    places = [f"{path}, record {number}" for number in range(1, len(value) + 1)]
    return [Record(place, _checked(inner, place)) for place, inner in zip(places, value, strict=True)]


def _read_parquet(path: Path) -> Sequence[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_library(f"{path} is a parquet file, which pyarrow reads; it") from None
    try:
        return Rows(str(path), parquet.read_table(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise MalformedFile(f"{path} is no parquet file that pyarrow reads: {str(error).rstrip('.')}.") from None


def missing_library(what: str) -> CordaConvertError:
    """The refusal of what needs the extra `[data]`."""
    return UnsupportedInput(f"{what} is not installed.", next_step="Install it with: pip install datasets")


def _checked(value: Any, place: str) -> str | Mapping[str, Any]:
    if isinstance(value, str | dict):
        return value
    raise MalformedFile(f"{place} is {kind_of(value)}; a record is an object with fields, or a string.")


def kind_of(value: Any) -> str:
    """A value of JSON in words, for messages."""
    names = {dict: "an object", list: "a list", type(None): "null", bool: "true or false", str: "a string"}
    if isinstance(value, int | float):
        return names.get(type(value), "a number")
    return names.get(type(value), "binary" if isinstance(value, bytes) else f"a {type(value).__name__}")
