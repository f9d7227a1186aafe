"""Damage to files, each a function of a few integers: bytes, the structure of what they hold, and what stands at the path."""

import copy
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Draw = tuple[int, int, int]
"""Which kind of damage, and two places."""

DEEP = "[" * 3000 + "]" * 3000

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**53 + 1, 2**60, 2**63, 2**64, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("-inf"), float("nan"), "", "x", "../../x", "/etc/passwd", "a\0b", "\ud800", "n" * 5000, "a/b", "..",
    "F32", "BF16", "F8_E4M3", "F4", "I64", "LORA", "MISS", "BONE", "TRAINABLE_TOKENS", "bat", "mini", "pissa", "corda", "llama",
    "qwen3_moe", "all-linear", "(", "([a-z0-9_.]+)*!", ".*", "q_proj", "lm_head", "model.norm", "1", "1e400", [], {}, [[]], [0],
    [-1], [2**62, 2**62], [1, 2, 3], ["x"], [None], {"x": 1}, {"": None}, {"x": {"x": [1]}},
)  # fmt: skip
"""Values that a key is given in place of its own."""


def mutate(path: Path, draws: Sequence[Draw], outside: Path) -> None:
    """Damages the file. `outside` is a valid file elsewhere, for links."""
    content = path.read_bytes()
    for kind, first, second in draws:
        kinds = [*BYTES, *STRUCTURES[structure_of(path)] * 4]
        if kind % 29 == 0:
            PATHS[first % len(PATHS)](path, outside)
            return
        content = kinds[kind % len(kinds)](content, first, second)
    path.write_bytes(content)


def structure_of(path: Path) -> str:
    if path.suffix in (".pt", ".bin", ".pth"):
        return "archive"
    return {".json": "json", ".jsonl": "lines", ".safetensors": "safetensors"}.get(path.suffix, "json")


def restore(path: Path, content: bytes, changed_ns: int) -> None:
    """Takes back whatever was done at the path."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(changed_ns, changed_ns))


# Bytes


def flip(content: bytes, first: int, second: int) -> bytes:
    if not content:
        return b"\0"
    changed = bytearray(content)
    changed[first % len(content)] ^= second % 255 + 1
    return bytes(changed)


def flip_in_front(content: bytes, first: int, second: int) -> bytes:
    return flip(content[:400], first, second) + content[400:]


def cut(content: bytes, first: int, _second: int) -> bytes:
    return content[: first % (len(content) + 1)]


def cut_a_little(content: bytes, first: int, _second: int) -> bytes:
    return content[: -(first % 9) - 1]


def cut_out(content: bytes, first: int, second: int) -> bytes:
    begin = first % (len(content) + 1)
    return content[:begin] + content[begin + second % 40 :]


def double(content: bytes, first: int, second: int) -> bytes:
    begin = first % (len(content) + 1)
    return content[: begin + second % 40] + content[begin:]


def blank(content: bytes, first: int, second: int) -> bytes:
    begin = first % (len(content) + 1)
    nothing = (b"\0", b" ", b"9", b"\xff")[second % 4] * min(len(content) - begin, second % 30)
    return content[:begin] + nothing + content[begin + len(nothing) :]


def append(content: bytes, first: int, second: int) -> bytes:
    return content + bytes([second % 256]) * (first % 10 + 1)


BYTES: tuple[Callable[[bytes, int, int], bytes], ...] = (
    flip, flip_in_front, cut, cut_a_little, cut_out, double, blank, append,
)  # fmt: skip


# JSON


def change_json(document: Any, first: int, second: int) -> str:
    """The document with one value, key or place changed, as text."""
    changed = copy.deepcopy(document)
    places = list(inner_places(changed))
    if not places:
        return json.dumps(ODD[second % len(ODD)])
    container, key = places[first % len(places)]
    odd = ODD[second % len(ODD)]
    action = (first // len(places)) % 10
    if action < 4:
        container[key] = odd
    elif action == 4:
        container[key] = nudged(container[key], second)
    elif action == 5:
        del container[key]
    elif action == 6:
        other, place = places[second % len(places)]
        container[key] = copy.deepcopy(other[place])
    elif action == 7 and isinstance(container, dict):
        container[odd if isinstance(odd, str) else str(odd)] = container.pop(key)
    elif action == 8 and isinstance(container, dict):
        container[key] = "\1"
        return json.dumps(changed).replace('"\\u0001"', f"{json.dumps(odd)}, {json.dumps(key)}: 1", 1)
    else:
        container[key] = "\1"
        return json.dumps(changed).replace('"\\u0001"', DEEP, 1)
    return json.dumps(changed)


def inner_places(document: Any) -> list[tuple[Any, Any]]:
    """Every value in the document: what holds it, and its key there."""
    keys = list(document) if isinstance(document, dict) else range(len(document) if isinstance(document, list) else 0)
    own = [(document, key) for key in keys]
    return own + [place for _, key in own for place in inner_places(document[key])]


def nudged(value: Any, by: int) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return (value + 1, value - 1, -value, value * 2, float(value), str(value), value * 2**40)[by % 7]
    if isinstance(value, str):
        place = by % (len(value) + 1)
        return (
            value[:place] + value[place + 1 :],
            value + " ",
            value.upper(),
            [value],
            value[:place] + "." + value[place:],
        )[by % 5]
    if isinstance(value, list):
        return (value[::-1], value * 2, value[1:], dict.fromkeys(map(str, value), 1), [value])[by % 5]
    return list(value.items()) if by % 2 else list(value)


def in_json(content: bytes, first: int, second: int) -> bytes:
    try:
        return change_json(json.loads(content), first, second).encode()
    except (ValueError, RecursionError):
        return flip(content, first, second)


def in_lines(content: bytes, first: int, second: int) -> bytes:
    lines = content.splitlines(keepends=True) or [b"{}"]
    place = second % len(lines)
    lines[place] = in_json(lines[place], first, second // len(lines)) + b"\n"
    return b"".join(lines)


def in_order(content: bytes, first: int, second: int) -> bytes:
    """Two lines exchanged, or one twice."""
    lines = content.splitlines(keepends=True) or [b""]
    one, other = first % len(lines), second % len(lines)
    lines[one], lines[other] = (lines[other], lines[one]) if first % 2 else (lines[one], lines[one])
    return b"".join(lines)


# Safetensors


def in_header(content: bytes, first: int, second: int) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = in_json(content[8 : 8 + length], first, second)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def in_length(content: bytes, first: int, second: int) -> bytes:
    length = int.from_bytes(content[:8], "little")
    changed = (2**60, 2**63, 2**64 - 1, 0, 1, length + 8, max(length - 1, 0), len(content), 10**8 + 1)[first % 9]
    return min(changed, 2**64 - 1).to_bytes(8, "little") + content[8:]


def tensors_exchanged(content: bytes, first: int, second: int) -> bytes:
    """Two tensors have each other's places."""
    length = int.from_bytes(content[:8], "little")
    try:
        entries = json.loads(content[8 : 8 + length])
        names = [name for name in entries if name != "__metadata__"]
        one, other = names[first % len(names)], names[second % len(names)]
        entries[one], entries[other] = entries[other], entries[one]
    except (ValueError, RecursionError, ArithmeticError, TypeError):
        return flip(content, first, second)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


# Archives of torch.save


def in_record(content: bytes, first: int, second: int) -> bytes:
    """The archive with one record changed, and all its checksums right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except Exception:
        return flip(content, first, second)
    names = sorted(records, key=lambda name: not name.endswith("data.pkl"))
    name = names[0] if first % 4 else names[first // 4 % len(names)]
    records[name] = BYTES[second % len(BYTES)](records[name], first // 4, second // len(BYTES))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED if second % 31 == 0 else zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return written.getvalue()


STRUCTURES: dict[str, list[Callable[[bytes, int, int], bytes]]] = {
    "json": [in_json],
    "lines": [in_lines, in_order],
    "safetensors": [in_header, in_header, in_header, in_length, tensors_exchanged],
    "archive": [in_record],
}


# What stands at the path


def empty(path: Path, _outside: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path, _outside: Path) -> None:
    path.unlink()


def directory(path: Path, _outside: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside)


def loop(path: Path, _outside: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def device(path: Path, _outside: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path, _outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


PATHS: tuple[Callable[[Path, Path], None], ...] = (empty, remove, directory, link, loop, device, pipe)
