"""Disks that are full, read-only or fail, sources that change, odd file systems: one clear message, and nothing destroyed."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from building import files_below, read_json, write_checkpoint, write_covariances, write_lora
from conftest import Ran, assert_no_leftovers

from corda_convert.operations.transforms import FoldTransform
from corda_convert.output import staging
from corda_convert.output.staging import staging_folder

Command = Callable[..., Ran]

RECEIPT = "corda_convert.json"
COMMANDS = ("merge", "decompose", "to-lora")


@dataclass(frozen=True)
class Sources:
    """A model of two shards with a side file, an adapter and covariances, and what must never change in them."""

    folder: Path
    content: dict[str, bytes]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def lora(self) -> Path:
        return self.folder / "lora"

    def arguments(self, name: str) -> list[str]:
        """The command without its output."""
        covariances = self.folder / "covariances.safetensors"
        return {
            "merge": ["merge", str(self.model), "--adapter", str(self.lora)],
            "decompose": ["decompose", str(self.model), "--cov", str(covariances), "--mode", "kpm", "--rank", "4"],
            "to-lora": ["to-lora", str(self.lora), "--rank", "2"],
        }[name]

    def read_file(self, name: str) -> Path:
        """A file of weights that the command reads."""
        return self.lora / "adapter_model.safetensors" if name == "to-lora" else second_shard(self.model)

    def assert_untouched(self) -> None:
        assert files_below(self.folder) == self.content


def second_shard(model: Path) -> Path:
    return model / "model-00002-of-00002.safetensors"


def make_sources(folder: Path) -> Sources:
    model = write_checkpoint(folder / "model", shards=2)
    (model / "tokenizer.json").write_text("{}" + " " * 5000)
    write_lora(folder / "lora")
    write_covariances(folder / "covariances.safetensors")
    return Sources(folder, files_below(folder))


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Sources]:
    made = make_sources(tmp_path / "sources")
    yield made
    made.assert_untouched()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Command, str], dict[str, bytes]]:
    """The files that a command makes of these sources, but for its receipt."""
    folder = tmp_path_factory.mktemp("undisturbed")
    made = make_sources(folder / "sources")
    cache: dict[str, dict[str, bytes]] = {}

    def run(command: Command, name: str) -> dict[str, bytes]:
        if name not in cache:
            output = folder / name / "out"
            output.parent.mkdir()
            with contextlib.chdir(output.parent):
                assert command(*made.arguments(name), "-o", "out").status == 0
            cache[name] = without_receipt(output)
        return cache[name]

    return run


def without_receipt(output: Path) -> dict[str, bytes]:
    files = files_below(output)
    assert files.pop(RECEIPT)
    return files


def in_place(command: Command, folder: Path, *arguments: object) -> Ran:
    """Runs the command with the output `out` in the folder."""
    with contextlib.chdir(folder):
        return command(*arguments, "-o", "out")


def assert_refused(ran: Ran, folder: Path) -> str:
    """The one message of a refusal that left nothing in the folder but what stood there."""
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("Error: ")
    assert ran.err.count("Error: ") == 1, ran.err
    assert "Traceback" not in ran.err
    assert_no_leftovers(folder)
    return ran.err.removeprefix("Error: ").rstrip("\n")


# Full and read-only disks, in a program with mounts of its own


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `small_disks.py` saw."""
    folder = tmp_path_factory.mktemp("disks")
    made = make_sources(folder / "sources")
    spec = {
        "folder": str(folder),
        "commands": {name: made.arguments(name) for name in COMMANDS},
        "sources": str(made.folder),
    }
    program = Path(__file__).with_name("small_disks.py")
    done = subprocess.run([sys.executable, str(program), json.dumps(spec)], capture_output=True, text=True, timeout=600)
    if done.returncode == 77:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    made.assert_untouched()
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills_up_is_said_so_leaves_nothing_and_the_old_output(disks: dict[str, Any], name: str) -> None:
    runs = disks["full"][name]
    assert len(runs) >= 6
    for run in runs:
        assert run["status"] == 1, run
        assert "No space left on device" in run["err"], run
        assert "Free disk space" in run["err"], run
        assert run["err"].count("Error: ") == 1, run
        assert run["left"] == run["before"]
    assert len({run["err"] for run in runs}) > 1  # it was another file that found no room


@pytest.mark.parametrize("name", COMMANDS)
def test_too_small_a_disk_is_found_before_any_work(disks: dict[str, Any], name: str) -> None:
    run = disks["preflight"][name]
    assert run["status"] == 1
    assert run["err"].startswith("Error: The output needs 0.00 GB, and ")
    assert run["left"] == run["before"]


@pytest.mark.parametrize("name", COMMANDS)
def test_with_room_made_the_same_command_ends_as_an_undisturbed_one(disks: dict[str, Any], name: str) -> None:
    assert disks["again"][name] == disks["undisturbed"][name]
    assert disks["again"][name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_file_system_is_refused_before_any_work(disks: dict[str, Any], name: str) -> None:
    run = disks["read-only"][name]
    assert run["status"] == 1
    assert "cannot be written" in run["err"]
    assert "Traceback" not in run["err"]
    assert run["left"] == run["before"]


@pytest.mark.parametrize("name", COMMANDS)
def test_sources_on_a_read_only_file_system_are_enough(disks: dict[str, Any], name: str) -> None:
    assert disks["read-only sources"][name] == disks["undisturbed"][name]


def test_a_mount_point_as_output_is_refused_before_any_work(disks: dict[str, Any]) -> None:
    run = disks["mount point"]
    assert run["status"] == 1
    assert "is a mount point" in run["err"]
    assert run["left"] == run["before"]


def test_other_file_systems_than_the_sources_give_the_same_bytes(disks: dict[str, Any]) -> None:
    assert disks["other file system"] == disks["undisturbed"]["merge"]


# Reading


def failing_reads(monkeypatch: pytest.MonkeyPatch, path: Path, after: int) -> None:
    """From the byte `after` of the file on, reading fails as on a damaged disk."""
    inode = path.stat().st_ino
    original = {name: getattr(os, name) for name in ("preadv", "pread", "copy_file_range")}

    def is_bad(descriptor: int, nbytes: int, offset: int) -> bool:
        return os.fstat(descriptor).st_ino == inode and offset + nbytes > after

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if is_bad(descriptor, sum(map(len, buffers)), offset):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(original["preadv"](descriptor, buffers, offset))

    def pread(descriptor: int, nbytes: int, offset: int) -> bytes:
        if is_bad(descriptor, nbytes, offset):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return bytes(original["pread"](descriptor, nbytes, offset))

    def copy_file_range(source: int, target: int, count: int, begin: int, offset: int) -> int:
        if is_bad(source, count, begin):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(original["copy_file_range"](source, target, count, begin, offset))

    for replacement in (preadv, pread, copy_file_range):
        monkeypatch.setattr(os, replacement.__name__, replacement)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("part", [0.6, 0.99])
def test_a_read_error_is_said_with_the_file_and_leaves_nothing(
    command: Command, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: float
) -> None:
    path = sources.read_file(name)
    with monkeypatch.context() as patched:
        failing_reads(patched, path, int(part * path.stat().st_size))
        message = assert_refused(in_place(command, tmp_path, *sources.arguments(name)), tmp_path)
    assert "cannot be read at byte " in message
    assert "Input/output error" in message
    assert path.name in message
    assert not (tmp_path / "out").exists()


def test_a_read_error_of_what_is_only_copied_is_no_writing_error(
    command: Command, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "copy_file_range", fail)
    message = assert_refused(in_place(command, tmp_path, *sources.arguments("merge")), tmp_path)
    assert message.startswith("The source of model-0000")
    assert "cannot be read at byte " in message


def test_a_config_that_cannot_be_read_is_not_called_bad_json(
    command: Command, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def fail(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", fail)
    message = assert_refused(in_place(command, tmp_path, *sources.arguments("merge")), tmp_path)
    assert message == f"{sources.model / 'config.json'} cannot be read: Input/output error."


@pytest.mark.parametrize("name", COMMANDS)
def test_short_reads_and_short_writes_change_nothing(
    command: Command,
    sources: Sources,
    undisturbed: Callable[[Command, str], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    expected = undisturbed(command, name)
    preadv, pwrite, copy = os.preadv, os.pwrite, os.copy_file_range
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:97]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, memoryview(view)[:101], offset))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *rest: copy(a, b, min(count, 103), *rest))
    assert in_place(command, tmp_path, *sources.arguments(name)).status == 0
    assert without_receipt(tmp_path / "out") == expected


# Sources that change


def on_first_weight(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Makes the change when the first weight is computed: all headers are read by then, and most bytes are not."""
    begin = FoldTransform.begin
    left = [change]

    def changing(transform: FoldTransform, device: Any) -> Any:
        while left:
            left.pop()()
        return begin(transform, device)

    monkeypatch.setattr(FoldTransform, "begin", changing)


def rewrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))


def replace(path: Path) -> None:
    other = path.with_name("other")
    stat = path.stat()
    other.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [rewrite, replace, cut, Path.unlink])
@pytest.mark.parametrize("what", ["shard", "adapter"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], what: str
) -> None:
    sources = make_sources(tmp_path / "sources")
    path = second_shard(sources.model) if what == "shard" else sources.lora / "adapter_model.safetensors"
    on_first_weight(monkeypatch, lambda: change(path))
    message = assert_refused(in_place(command, tmp_path, *sources.arguments("merge")), tmp_path)
    assert path.name in message.splitlines()[0], message
    assert message.endswith("\nRun the same command again once the file is whole.")
    assert not (tmp_path / "out").exists()


def test_a_side_file_that_changes_while_the_weights_are_made_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make_sources(tmp_path / "sources")
    on_first_weight(monkeypatch, lambda: rewrite(sources.model / "tokenizer.json"))
    message = assert_refused(in_place(command, tmp_path, *sources.arguments("merge")), tmp_path)
    assert message.startswith("A file beside the weights was changed")


def test_a_shard_that_is_replaced_between_header_and_weights_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make_sources(tmp_path / "sources")
    path = second_shard(sources.model)
    check = staging.check_output

    def changing(*arguments: Any, **options: Any) -> None:
        replace(path)
        check(*arguments, **options)

    monkeypatch.setattr(staging, "check_output", changing)
    message = assert_refused(in_place(command, tmp_path, *sources.arguments("merge")), tmp_path)
    assert message.startswith(f"{path} was changed while it was read.")


@pytest.mark.parametrize("place", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(command: Command, tmp_path: Path, place: str) -> None:
    sources = make_sources(tmp_path / "sources")
    (sources.model / place).unlink()
    os.mkfifo(sources.model / place)
    assert_refused(in_place(command, tmp_path, *sources.arguments("merge")), tmp_path)


# Two runs on one output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_run_on_one_output_is_refused_and_the_first_one_undisturbed(
    command: Command, sources: Sources, tmp_path: Path, name: str
) -> None:
    with staging_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
        ran = in_place(command, tmp_path, *sources.arguments(name))
        assert (ran.status, ran.out) == (1, "")
        assert ran.err == (
            f"Error: Another run of corda-convert is writing {tmp_path / 'out'}.\nWait for it, or choose another -o.\n"
        )
        assert files_below(folder) == {"a": b"first"}
    assert files_below(tmp_path / "out") == {"a": b"first"}


def test_a_file_system_without_locks_is_taken_without(
    command: Command, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    assert in_place(command, tmp_path, *sources.arguments("merge")).status == 0
    assert_no_leftovers(tmp_path)


# File systems that lack something


@pytest.mark.parametrize("code", ["EXDEV", "EINVAL", "EOPNOTSUPP", "ENOSYS", "EPERM", "EBADF", "nothing"])
def test_without_copies_by_the_kernel_the_bytes_are_the_same(
    command: Command,
    sources: Sources,
    undisturbed: Callable[[Command, str], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
) -> None:
    def refuse(*_: object) -> int:
        if code == "nothing":  # some kernels copy no byte and say nothing
            return 0
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number))

    expected = undisturbed(command, "merge")
    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert in_place(command, tmp_path, *sources.arguments("merge")).status == 0
    assert without_receipt(tmp_path / "out") == expected


@pytest.mark.parametrize("code", ["EXDEV", "EPERM", "ENOTEMPTY", "EBUSY"])
@pytest.mark.parametrize("old", [False, True])
def test_an_output_that_cannot_be_renamed_is_said_so_and_the_old_one_stays(
    command: Command, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, old: bool
) -> None:
    arguments = sources.arguments("merge")
    if old:
        assert in_place(command, tmp_path, *arguments).status == 0
        arguments.append("--overwrite")
    before = files_below(tmp_path)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.parent.name.endswith(staging.STAGING_SUFFIX):
            number = getattr(errno, code)
            raise OSError(number, os.strerror(number), str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    message = assert_refused(in_place(command, tmp_path, *arguments), tmp_path)
    assert message.startswith(f"Writing {tmp_path / 'out'} failed: ")
    assert os.strerror(getattr(errno, code)) in message
    assert files_below(tmp_path) == before


# Where inputs and outputs lie


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("place", ["inside", "itself", "around", "through a link"])
def test_an_output_in_or_around_an_input_is_refused(
    command: Command, sources: Sources, tmp_path: Path, name: str, place: str
) -> None:
    source = sources.lora if name == "to-lora" else sources.model
    (tmp_path / "link").symlink_to(source)
    output = {
        "inside": source / "out",
        "itself": source,
        "around": sources.folder,
        "through a link": tmp_path / "link" / "out",
    }[place]
    ran = command(*sources.arguments(name), "-o", output, "--overwrite")
    assert (ran.status, ran.out) == (1, "")
    assert "lie inside one another" in ran.err


def test_a_covariance_file_in_the_output_is_not_destroyed(command: Command, sources: Sources) -> None:
    ran = command(*sources.arguments("decompose"), "-o", sources.folder, "--overwrite")
    assert ran.status == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_sources_that_are_links_as_in_the_hubs_cache_are_read_and_written_as_files(
    command: Command,
    sources: Sources,
    undisturbed: Callable[[Command, str], dict[str, bytes]],
    tmp_path: Path,
    name: str,
) -> None:
    cache = tmp_path / "cache"
    for folder in ("model", "lora"):
        snapshot = cache / folder
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted((sources.folder / folder).iterdir())):
            blob = cache / "blobs" / f"{folder}{number}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(Path("..") / "blobs" / blob.name)
    before = files_below(cache)
    arguments = [argument.replace(f"{sources.folder}/", f"{cache}/") for argument in sources.arguments(name)]
    if name == "decompose":
        shutil.copyfile(sources.folder / "covariances.safetensors", cache / "covariances.safetensors")
        before = files_below(cache)
    assert in_place(command, tmp_path, *arguments).status == 0
    assert without_receipt(tmp_path / "out") == undisturbed(command, name)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert files_below(cache) == before


@pytest.mark.parametrize("target", ["nothing", "itself"])
def test_a_shard_that_is_a_link_to_nowhere_is_missing(command: Command, tmp_path: Path, target: str) -> None:
    sources = make_sources(tmp_path / "sources")
    shard = second_shard(sources.model)
    shard.unlink()
    shard.symlink_to(shard if target == "itself" else tmp_path / "gone")
    message = assert_refused(in_place(command, tmp_path, *sources.arguments("merge")), tmp_path)
    assert shard.name in message


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_is_a_link_is_written_where_it_points(
    command: Command, sources: Sources, tmp_path: Path, name: str
) -> None:
    (tmp_path / "elsewhere" / "target").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "target")
    assert in_place(command, tmp_path, *sources.arguments(name)).status == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "target" / RECEIPT).is_file()
    assert_no_leftovers(tmp_path / "elsewhere")
    assert_no_leftovers(tmp_path)


def test_an_output_that_is_a_link_to_nowhere_is_made_there(command: Command, sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "target")
    assert in_place(command, tmp_path, *sources.arguments("merge")).status == 0
    assert read_json(tmp_path / "elsewhere" / "target" / RECEIPT)["command"] == "merge"
    assert_no_leftovers(tmp_path / "elsewhere")


def test_a_loop_of_links_as_output_is_refused(command: Command, sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    ran = in_place(command, tmp_path, *sources.arguments("merge"))
    assert (ran.status, ran.err.count("Error: ")) == (1, 1), ran
