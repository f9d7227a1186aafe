"""`--stream --push-to`: weights go up while the run goes on, and are not kept here; the commit is last."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from building import MODEL, read_json, write_checkpoint, write_lora
from hub_server import Hub, running_hub

ROOT = Path(__file__).parent.parent
SHARDS = 6


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_checkpoint(folder / "base", shards=SHARDS)
    write_lora(folder / "adapter")
    return folder


def start(hub: Hub, place: Path, inputs: Path, *options: str) -> subprocess.Popen[str]:
    merge = ["merge", inputs / "base", "--adapter", inputs / "adapter", "-o", place / "merged"]
    return subprocess.Popen(
        [sys.executable, "-m", "corda_convert", *map(str, merge), *options],
        cwd=ROOT,
        env=hub.environment(place / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub: Hub, place: Path, inputs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    process = start(hub, place, inputs, *options)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


STREAM = ("--stream", "--push-to", "alice/merged")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of the same merge without any Hub."""
    place = tmp_path_factory.mktemp("expected")
    with running_hub() as server:
        done = run(server, place, inputs)
    assert done.returncode == 0, done.stderr
    return shards(contents(place / "merged"))


def test_the_weights_are_on_the_hub_and_all_else_is_here_and_is_pushed_again_only_there(
    hub, inputs, expected, tmp_path
) -> None:
    done = run(hub, tmp_path, inputs, *STREAM, "--json")
    assert done.returncode == 0, done.stderr
    there, here = hub.repositories["alice/merged"].files(), contents(tmp_path / "merged")
    assert shards(there) == expected
    assert shards(here) == {}
    assert {name: content for name, content in there.items() if name not in expected} == here
    (commit,) = hub.repositories["alice/merged"].history()
    receipt = read_json(tmp_path / "merged" / "corda_convert.json")
    assert receipt["streamed_to"] == {"repo_id": "alice/merged", "revision": None, "files": sorted(expected)}
    assert {entry["name"]: entry["bytes"] for entry in receipt["files"]} == {
        name: len(content) for name, content in there.items() if name != "corda_convert.json"
    }
    assert json.loads(done.stdout)["published"]["commit"] == commit.oid
    assert [path.name for path in tmp_path.iterdir() if "corda-convert" in path.name] == []

    unverified = subprocess.run(
        [sys.executable, "-m", "corda_convert", "verify", str(tmp_path / "merged")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert unverified.returncode == 1
    assert "its shards are on the Hub only" in unverified.stdout + unverified.stderr
    push = [sys.executable, "-m", "corda_convert", "push", str(tmp_path / "merged")]
    environment = hub.environment(tmp_path / "home")
    again, elsewhere = (
        subprocess.run([*push, name], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        for name in ("alice/merged", "alice/other")
    )
    assert again.returncode == 0, again.stderr
    assert "already" in again.stdout
    assert elsewhere.returncode == 1
    assert "is neither here nor in alice/other" in elsewhere.stderr
    assert hub.repositories["alice/other"].files() == {}


def test_few_shards_are_on_the_disk_while_the_hub_is_slow(hub, inputs, expected, tmp_path) -> None:
    most = 0

    def look() -> None:
        nonlocal most
        work = tmp_path / ".merged.corda-convert-partial" / "output"
        finished = [path for path in work.glob("model-*.safetensors") if path.read_bytes() == expected[path.name]]
        most = max(most, len(finished))

    hub.interfere_next("/lfs-storage/", method="PUT", delay=0.15, first=look, times=SHARDS)
    done = run(hub, tmp_path, inputs, *STREAM)
    assert done.returncode == 0, done.stderr
    assert f"  of them  {SHARDS} are on the Hub only, in alice/merged\n" in done.stdout
    assert 1 <= most <= 4
    assert len(hub.requests_to("/lfs-storage/", "PUT")) == SHARDS


def test_what_the_hub_refused_once_is_gone_on_with_and_computed_once(hub, inputs, expected, tmp_path) -> None:
    hub.fail_next(hashlib.sha256(expected[sorted(expected)[3]]).hexdigest(), status=403)
    stopped = run(hub, tmp_path, inputs, *STREAM)
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    assert "Run the same command again to go on" in stopped.stderr
    assert not (tmp_path / "merged").exists()
    repository = hub.repositories["alice/merged"]
    assert repository.files() == {}
    assert len(repository.lfs_objects) == 3
    hub.requests.clear()
    done = run(hub, tmp_path, inputs, *STREAM)
    assert done.returncode == 0, done.stderr
    assert shards(repository.files()) == expected
    assert len(hub.requests_to("/lfs-storage/", "PUT")) == SHARDS - 3
    assert len(read_json(tmp_path / "merged" / "corda_convert.json")["run"]["resumed"]["files"]) >= 3


def test_what_the_hub_has_lost_in_between_is_made_again(hub, inputs, expected, tmp_path) -> None:
    hub.fail_next("/commit/", status=403)
    stopped = run(hub, tmp_path, inputs, *STREAM)
    assert stopped.returncode == 1
    assert "Run the same command again to go on" in stopped.stderr
    lost = list(hub.repositories["alice/merged"].lfs_objects)[:2]
    for oid in lost:
        del hub.repositories["alice/merged"].lfs_objects[oid]
    done = run(hub, tmp_path, inputs, *STREAM)
    assert done.returncode == 0, done.stderr
    assert shards(hub.repositories["alice/merged"].files()) == expected
    assert len(read_json(tmp_path / "merged" / "corda_convert.json")["run"]["resumed"]["files"]) == SHARDS - 2


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(hub, inputs, expected, tmp_path) -> None:
    hub.interfere_next("/lfs-storage/", method="PUT", delay=0.3, times=SHARDS)
    process = start(hub, tmp_path, inputs, *STREAM)
    deadline = time.monotonic() + 60
    while len(hub.requests_to("/lfs-storage/", "PUT")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "merged").exists()
    assert hub.repositories["alice/merged"].files() == {}
    done = run(hub, tmp_path, inputs, *STREAM)
    assert done.returncode == 0, done.stderr
    assert shards(hub.repositories["alice/merged"].files()) == expected


def test_decompose_keeps_the_initial_adapter_here(hub, tmp_path) -> None:
    covariances = ROOT / "fixtures/covariances/knowledge.safetensors"
    arguments = ["decompose", str(MODEL), "--cov", str(covariances), "--mode", "kpm", "--rank", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "corda_convert", *arguments, "-o", str(tmp_path / "residual"), *STREAM],
        cwd=ROOT,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there, here = hub.repositories["alice/merged"].files(), contents(tmp_path / "residual")
    assert {name for name in there if name not in here} == {
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    }
    assert "corda_init/adapter_model.safetensors" in here


def test_two_processes_read_a_model_of_the_hub_and_publish_once(hub, inputs, expected, tmp_path) -> None:
    hub.add_repository("acme/base").add_folder(inputs / "base")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "corda_convert"]
    merge = ["merge", "acme/base", "--adapter", inputs / "adapter", "--push-to", "alice/merged"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, merge), "-o", str(tmp_path / "merged")],
        cwd=ROOT,
        env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Published ") == 1
    assert shards(contents(tmp_path / "merged")) == shards(hub.repositories["alice/merged"].files()) == expected
    assert len(hub.repositories["alice/merged"].history()) == 1
