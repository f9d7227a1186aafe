"""Batches that run through a block at once give what they give one after the other, and what transformers gives."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from building import FIXTURES, MODEL
from safetensors import safe_open

from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.corpus import CorpusOptions
from corda_convert.operations.collect import collect
from corda_convert.operations.collect_options import CollectOptions
from corda_convert.operations.options import RunOptions
from corda_convert.streaming.architecture import build_architecture
from corda_convert.streaming.stream import Batch, LayerStream, make_batches
from corda_convert.streaming.taps import InputTaps
from corda_convert.streaming.threads import ModelThreads

pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")
DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    lengths = (30, 30, 30, 17, 30, 17, 17)
    samples = [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths]
    return make_batches(samples, 1)


def _overwrite(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
    args[0].zero_()


def _keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    module.kept = args[0]
    time.sleep(0.01)  # another batch that ran meanwhile would leave its own here


def _use_kept(module: torch.nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + module.kept.mean()


def _make_it(kind: str, module: torch.nn.Module) -> None:
    """What its hooks make of a module."""
    if kind == "overwrites its inputs":
        module.register_forward_hook(_overwrite)
    elif kind == "keeps a state":
        module.register_forward_pre_hook(_keep)
        module.register_forward_hook(_use_kept)


def _inputs_of_the_whole_model(batches: list[Batch], kind: str) -> dict[str, list[torch.Tensor]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
    found: dict[str, list[torch.Tensor]] = {}
    for index in range(model.config.num_hidden_layers):
        module = model.get_submodule(DOWN.format(index))
        name = DOWN.format(index)
        module.register_forward_pre_hook(
            lambda _module, args, name=name: found.setdefault(name, []).append(args[0].clone())
        )
        _make_it(kind, module)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids)
    return found


@pytest.mark.parametrize("kind", ["plain", "overwrites its inputs", "keeps a state"])
def test_inputs_are_those_of_the_whole_model_in_the_order_of_the_batches(kind: str, batches: list[Batch]) -> None:
    expected = _inputs_of_the_whole_model(batches, kind)
    architecture = build_architecture(read_checkpoint(MODEL))
    found: dict[str, list[torch.Tensor]] = {}
    threads = ModelThreads(CPU, len(batches))
    assert threads.at_once == 2
    with threads:
        stream = LayerStream(architecture, batches, device=CPU, threads=threads)
        stream.embed()
        for index in range(len(stream.blocks.modules)):
            name = DOWN.format(index)
            module = architecture.model.get_submodule(name)
            _make_it(kind, module)
            taps = InputTaps({name: module}, lambda name, rows: found.setdefault(name, []).append(rows.clone()))
            stream.run_block(index, lambda *_, taps=taps: taps.end_batch(), taps)
            taps.remove()
            assert (stream._at_once == 1) == (kind != "plain")
        stream.close()
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert len(found[name]) == len(each) == len(batches)
        assert all(one.any() and torch.equal(one, other) for one, other in zip(found[name], each, strict=True))


def _take_back(module: torch.nn.Module, _args: tuple[torch.Tensor, ...], _output: object) -> None:
    time.sleep(0.01)
    del module.kept


def test_a_state_outside_the_blocks_that_another_batch_took_away_is_no_error(batches: list[Batch]) -> None:
    given: list[list[torch.Tensor]] = []
    for is_kept in (False, True):
        architecture = build_architecture(read_checkpoint(MODEL))
        if is_kept:
            rotary = architecture.model.get_submodule("model.rotary_emb")
            rotary.register_forward_pre_hook(_keep)
            rotary.register_forward_hook(_take_back)
        found: list[torch.Tensor] = []
        with ModelThreads(CPU, len(batches)) as threads:
            stream = LayerStream(architecture, batches, device=CPU, threads=threads)
            stream.embed()
            stream.run_block(0, lambda _, states, found=found: found.append(states.clone()))
            assert (stream._at_once == 1) == is_kept
            stream.close()
        given.append(found)
    assert len(given[0]) == len(batches)
    assert all(torch.equal(plain, kept) for plain, kept in zip(*given, strict=True))


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Wide enough for torch's products to depend on its threads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 2}
    vocabulary = transformers.AutoConfig.from_pretrained(MODEL).vocab_size
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=vocabulary)).bfloat16()
    model.save_pretrained(tmp_path / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / "wide" / name)
    return tmp_path / "wide"


def test_a_wide_model_has_the_same_bytes_however_many_batches_run_at_once(wide: Path, tmp_path: Path) -> None:
    text = CorpusOptions(files=(FIXTURES / "data" / "task.jsonl",), field=("question",), samples=5, seq_len=160)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        options = CollectOptions(text, batch_tokens=160, whole_model=threads == 3)
        collect(wide, output=tmp_path / f"{threads}.safetensors", options=options, run=RunOptions(device="cpu"))
    first = (tmp_path / "1.safetensors").read_bytes()
    assert (tmp_path / "2.safetensors").read_bytes() == first
    with safe_open(tmp_path / "1.safetensors", "pt") as one, safe_open(tmp_path / "3.safetensors", "pt") as whole:
        assert set(one.keys()) == set(whole.keys())
        assert all(torch.equal(one.get_tensor(name), whole.get_tensor(name)) for name in one.keys())  # noqa: SIM118
