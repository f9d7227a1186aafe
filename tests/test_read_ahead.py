"""Inputs hashed ahead: the digests are those of the whole files, wherever the reading ahead stopped."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from building import (
    ADAPTERS,
    LINEARS,
    MODEL,
    llama_tensors,
    lora_config,
    lora_tensors,
    read_json,
    write_adapter,
    write_checkpoint,
    write_lora,
)

from corda_convert import ToLoraOptions, engine, merge, to_lora
from corda_convert.errors import NotFinite
from corda_convert.operations import production
from corda_convert.operations import to_lora as to_lora_module
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


@pytest.mark.parametrize("most_bytes", [0, 5_000])
def test_an_input_that_is_read_out_of_order_is_hashed_beside_the_engine(
    most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"model.layers.{place}.self_attn.q_proj" for place in range(3)]
    shape = (2048, 2048)
    monkeypatch.setattr(engine, "MOST_SEAM_BYTES", 100)
    initial = write_lora(tmp_path / "initial", dict.fromkeys(names, shape))
    trained = write_lora(tmp_path / "trained", dict.fromkeys(reversed(names), shape))
    monkeypatch.setattr(to_lora_module, "ReadAhead", lambda files: ReadAhead(files, most_bytes=most_bytes))
    read_again: list[Path] = []
    monkeypatch.setattr(production, "file_sha256", lambda path: read_again.append(path) or file_sha256(path))

    to_lora(trained, init=initial, output=tmp_path / "out", options=ToLoraOptions(as_is=True))

    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    found = [file["sha256"] for source in receipt["inputs"] for file in source["files"]]
    assert found == [file_sha256(folder / "adapter_model.safetensors") for folder in (trained, initial)]
    assert not [path for path in read_again if path.suffix == ".safetensors"]


def test_the_thread_beside_the_engine_ends_where_the_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[ReadAhead] = []
    start = ReadAhead.__enter__
    monkeypatch.setattr(ReadAhead, "__enter__", lambda ahead: begun.append(ahead) or start(ahead))
    tensors = lora_tensors(LINEARS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    initial = write_lora(tmp_path / "initial")
    trained = write_adapter(tmp_path / "trained", tensors, lora_config(4))
    with pytest.raises(NotFinite):
        to_lora(trained, init=initial, output=tmp_path / "out", options=ToLoraOptions(as_is=True))
    assert len(begun) == 2
    assert not any(ahead._thread.is_alive() for ahead in begun)
