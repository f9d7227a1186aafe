"""Inputs hashed ahead: the digests are those of the whole files, wherever the reading ahead stopped."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from building import ADAPTERS, MODEL, llama_tensors, read_json, write_checkpoint, write_lora

from corda_convert import merge
from corda_convert.operations import production
from corda_convert.output import read_ahead
from corda_convert.output.digests import SequentialDigest, file_sha256
from corda_convert.output.read_ahead import ReadAhead


def finished(ahead: ReadAhead) -> dict[Path, SequentialDigest]:
    while ahead._thread.is_alive():
        time.sleep(0.001)
    return ahead.stop()


def test_whole_files_are_hashed_in_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(paths, (100_000, 70_000), strict=True):
        path.write_bytes(bytes(range(256)) * (size // 256))
    with ReadAhead([*paths, tmp_path / "missing", *paths]) as ahead:
        digests = finished(ahead)
    assert {path: digest.hexdigest() for path, digest in digests.items()} == {path: file_sha256(path) for path in paths}


@pytest.mark.parametrize("cut", [1, 999, 1000, 1001, 4096])
def test_a_digest_goes_on_after_the_head_and_passes_over_it(cut: int) -> None:
    content = bytes(range(250)) * 20
    digest = SequentialDigest(len(content))
    digest.update(0, content[:cut])
    digest.skip_head()
    for begin in range(0, len(content), 1000):
        digest.update(begin, content[begin : begin + 1000])
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()


def test_bytes_out_of_order_behind_the_head_still_break_a_digest() -> None:
    digest = SequentialDigest(100)
    digest.update(0, bytes(10))
    digest.skip_head()
    digest.update(5, bytes(4))
    digest.update(20, bytes(80))
    digest.update(10, bytes(10))
    assert digest.is_broken
    assert digest.hexdigest() is None


@pytest.mark.parametrize("most_bytes", [0, 100, 5_000, 1 << 30])
def test_the_receipt_has_the_digests_of_the_inputs(
    most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(tmp_path / "model", llama_tensors(), shards=2)
    adapter = write_lora(tmp_path / "lora")
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 64)

    class Bounded(ReadAhead):
        def __init__(self, paths: list[Path]) -> None:
            super().__init__(paths, most_bytes=most_bytes)

        def stop(self) -> dict[Path, SequentialDigest]:
            while self._thread.is_alive():
                time.sleep(0.001)
            return super().stop()

    monkeypatch.setattr(production, "ReadAhead", Bounded)
    merge(model, adapter=adapter, output=tmp_path / "out")
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    found = {file["name"]: file["sha256"] for source in receipt["inputs"] for file in source["files"]}
    assert found == {
        path.name: file_sha256(path) for path in (*model.glob("*.safetensors"), *adapter.glob("*.safetensors"))
    }


def test_a_refusal_stops_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[ReadAhead] = []
    start = ReadAhead.__enter__

    def note(ahead: ReadAhead) -> ReadAhead:
        begun.append(ahead)
        return start(ahead)

    monkeypatch.setattr(ReadAhead, "__enter__", note)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(Exception, match="is not empty"):
        merge(MODEL, adapter=ADAPTERS / "lora", output=tmp_path / "out")
    assert begun
    assert not begun[0]._thread.is_alive()
