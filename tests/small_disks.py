"""A program for the tests: runs commands on tiny disks of its own, which are full or read-only.

Its argument is JSON: the `folder` to work in, the `commands` without `-o`, and the folder of their `sources`. It prints a
JSON object with what it saw. Exit status 77: this user may not mount. Nothing is mounted outside this process.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, REMOUNT, BIND, PRIVATE, RECURSIVE = 1, 32, 4096, 1 << 18, 1 << 14


def check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    check(LIBC.mount(source.encode(), str(target).encode(), kind.encode(), flags, options.encode()))


def enter_own_mounts() -> None:
    user, group = os.getuid(), os.getgid()
    check(LIBC.unshare(NEW_USERS | NEW_MOUNTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("none", Path("/"), "", PRIVATE | RECURSIVE)


@contextlib.contextmanager
def disk(place: Path, kilobytes: int):  # type: ignore[no-untyped-def]
    place.mkdir(exist_ok=True)
    mount("none", place, "tmpfs", 0, f"size={kilobytes}k")
    try:
        yield place
    finally:
        os.chdir("/")
        check(LIBC.umount2(str(place).encode(), 0))


def digests(folder: Path) -> dict[str, str]:
    """Every file and folder below, and the digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def made(folder: Path) -> dict[str, str]:
    """The output without its receipt."""
    return {name: digest for name, digest in digests(folder).items() if name != "corda_convert.json"}


def run(arguments: list[str], folder: Path, output: str = "out", **options: object) -> dict[str, Any]:
    from corda_convert.cli import main

    before = digests(folder)
    out, err, status = io.StringIO(), io.StringIO(), 99
    os.chdir(folder)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*arguments, "-o", output, *(f"--{name}" for name, given in options.items() if given)])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    return {"status": status, "err": err.getvalue(), "before": before, "left": digests(folder)}


def see(folder: Path, commands: dict[str, list[str]], sources: Path) -> dict[str, Any]:
    from corda_convert.output import staging

    seen: dict[str, Any] = {
        key: {} for key in ("undisturbed", "full", "preflight", "again", "read-only", "read-only sources")
    }
    check_space: Callable[..., None] = staging.check_space
    place = folder / "disk"
    for name, arguments in commands.items():
        plain = folder / name
        plain.mkdir()
        assert run(arguments, plain)["status"] == 0
        seen["undisturbed"][name] = made(plain / "out")
        files = [path for path in (plain / "out").rglob("*") if path.is_file()]
        kilobytes = sum(-(-path.stat().st_size // 4096) * 4 for path in files)
        seen["full"][name] = []
        staging.check_space = lambda *_: None  # another program takes the room after it was looked for
        for part in (0.02, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97):
            with disk(place, int(part * kilobytes / 4) * 4 + 4):
                seen["full"][name].append(run(arguments, place))
        with disk(place, int(1.5 * kilobytes)):
            assert run(arguments, place)["status"] == 0
            seen["full"][name].append(run(arguments, place, overwrite=True))
        staging.check_space = check_space
        with disk(place, 4):
            seen["preflight"][name] = run(arguments, place)
        with disk(place, kilobytes // 2):
            run(arguments, place)
            mount("none", place, "tmpfs", REMOUNT, f"size={4 * kilobytes}k")
            assert run(arguments, place)["status"] == 0
            seen["again"][name] = made(place / "out")
        with disk(place, 4 * kilobytes):
            mount("none", place, "tmpfs", REMOUNT | READ_ONLY)
            seen["read-only"][name] = run(arguments, place)
    mount(str(sources), sources, "", BIND)
    mount("none", sources, "", REMOUNT | BIND | READ_ONLY)
    for name, arguments in commands.items():
        other = folder / f"{name} again"
        other.mkdir()
        assert run(arguments, other)["status"] == 0
        seen["read-only sources"][name] = made(other / "out")
    with disk(place, 1000):
        seen["mount point"] = run(commands["merge"], folder, "disk")
        assert run(commands["merge"], place)["status"] == 0
        seen["other file system"] = made(place / "out")
    return seen


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    try:
        enter_own_mounts()
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(77)
    print(json.dumps(see(Path(spec["folder"]), spec["commands"], Path(spec["sources"]))))
