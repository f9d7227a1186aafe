"""`collect` against PEFT's own collection of covariances, and against float64."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from building import FIXTURES, MODEL
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution
from safetensors import safe_open
from test_collect_stream import MODELS
from transformers import PreTrainedModel

from corda_convert import CordaConvertError
from corda_convert.checkpoint.covariances import read_covariances
from corda_convert.checkpoint.tensors import read_tensor
from corda_convert.corpus import CorpusOptions, read_samples
from corda_convert.operations.collect import Collected, collect
from corda_convert.operations.collect_options import CollectOptions
from corda_convert.operations.options import RunOptions

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = FIXTURES / "data" / "task.jsonl"
TEXT = CorpusOptions(files=(TASK,), field=("question", "answer"), samples=9, pack=False)
PACKED = CorpusOptions(files=(TASK,), field=("question", "answer"), samples=9, seq_len=24)
CPU = RunOptions(device="cpu")
Command = Callable[..., Any]


def tiny(name: str, folder: Path, **changes: Any) -> Path:
    """A tiny random model with the fixtures' tokenizer. Its norms are near one, so that numbers neither grow nor vanish."""
    torch.manual_seed(0)
    config = MODELS[name]().config
    for level in {id(level): level for level in (config, config.get_text_config())}.values():
        level.vocab_size = 2048
    for key, value in changes.items():
        setattr(config, key, value)
    model = type(MODELS[name]())(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, folder / file)
    return folder


def load(folder: Path, dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype or "auto", **options).eval()


def samples(folder: Path, corpus: CorpusOptions) -> list[list[int]]:
    return read_samples(corpus, transformers.AutoTokenizer.from_pretrained(folder))


def of_peft(
    folder: Path, corpus: CorpusOptions, targets: list[str], file: Path, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """What PEFT's `preprocess_corda` collects."""
    model = load(folder, dtype)

    def run() -> None:
        for sample in samples(folder, corpus):
            model(input_ids=torch.tensor([sample]))

    config = LoraConfig(init_lora_weights="corda", target_modules=targets, corda_config=CordaConfig())
    calib_cov_distribution(model, config, run, None, str(file))
    return torch.load(file, weights_only=True)


def matrices(path: Path) -> dict[str, torch.Tensor]:
    """Every module's covariance, aliases included."""
    found = read_covariances(path)
    names = [*found.matrices, *found.aliases]
    read = {name: read_tensor(ref) for name in names if (ref := found.find(name)) is not None}
    found.close()
    return read


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to each matrix's largest entry."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name].double() - other.double()).abs().max() / other.abs().max()) for name, other in theirs.items()
    )


LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gemma3": LLAMA_LIKE,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"],
    "bert": ["query", "key", "value", "dense"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_covariances_are_those_that_peft_collects(name: str, tmp_path: Path) -> None:
    folder = tiny(name, tmp_path / "model")
    theirs = of_peft(folder, TEXT, TARGETS[name], tmp_path / "peft" / "cov.pt")
    collected = collect(folder, output=tmp_path / "covs.safetensors", options=CollectOptions(TEXT), run=CPU)
    ours = matrices(tmp_path / "covs.safetensors")
    assert worst(ours, theirs) < 2e-6
    for covariance in ours.values():
        assert torch.equal(covariance, covariance.T)
    assert collected.receipt["summary"]["tensors"]["collected"] < len(theirs) or name == "gpt2"


def test_long_samples_in_bfloat16_are_summed_as_exactly(tmp_path: Path) -> None:
    corpus = CorpusOptions(files=(TASK,), field=("question", "answer"), samples=9, seq_len=160)
    theirs = of_peft(MODEL, corpus, LLAMA_LIKE, tmp_path / "peft" / "cov.pt")
    options = CollectOptions(corpus, batch_tokens=160)
    collect(MODEL, output=tmp_path / "covs.safetensors", options=options, run=CPU)
    assert worst(matrices(tmp_path / "covs.safetensors"), theirs) < 2e-6


def test_each_distinct_input_is_stored_once(tmp_path: Path) -> None:
    collect(MODEL, output=tmp_path / "covs.safetensors", options=CollectOptions(TEXT), run=CPU)
    with safe_open(tmp_path / "covs.safetensors", "pt") as file:
        aliases = json.loads(file.metadata()["aliases"])
        stored = {name for name in file.keys() if not name.endswith(".mean_abs")}  # noqa: SIM118
    prefix = "model.layers.0"
    assert {name: target for name, target in aliases.items() if name.startswith(prefix)} == {
        f"{prefix}.self_attn.k_proj": f"{prefix}.self_attn.q_proj",
        f"{prefix}.self_attn.v_proj": f"{prefix}.self_attn.q_proj",
        f"{prefix}.mlp.up_proj": f"{prefix}.mlp.gate_proj",
    }
    assert len(stored) == 24


@pytest.mark.parametrize("normalization", ["peft", "none"])
def test_sums_and_mean_absolute_inputs_are_those_of_float64(normalization: Any, tmp_path: Path) -> None:
    options = CollectOptions(TEXT, normalization=normalization)
    collect(MODEL, output=tmp_path / "covs.safetensors", options=options, run=RunOptions(device="cpu", dtype="float32"))
    model, sums, means = load(MODEL, torch.float32), {}, {}
    texts = samples(MODEL, TEXT)

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.squeeze(0).double()
        means[name] = means.get(name, 0) + rows.abs().sum(dim=0)
        if normalization == "peft":
            rows = rows / rows.max().abs() / len(texts) ** 0.5
        sums[name] = sums.get(name, 0) + rows.T @ rows

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _module, args, name=name: add(name, args[0]))
    with torch.no_grad():
        for sample in texts:
            model(input_ids=torch.tensor([sample]))
    assert worst(matrices(tmp_path / "covs.safetensors"), sums) < 1e-6
    tokens = sum(map(len, texts))
    found = read_covariances(tmp_path / "covs.safetensors")
    for name, total in means.items():
        ref = found.find_scale(name)
        assert ref is not None
        assert torch.allclose(read_tensor(ref).double(), total / tokens, rtol=1e-6)
    assert (found.count("samples"), found.count("tokens")) == (len(texts), tokens)
    assert found.metadata["normalization"] == normalization


def test_the_whole_model_other_batches_and_offloading_change_nothing_but_rounding(tmp_path: Path) -> None:
    reference = tmp_path / "reference.safetensors"
    collect(MODEL, output=reference, options=CollectOptions(PACKED, batch_tokens=1), run=CPU)
    variants = {
        "whole": CollectOptions(PACKED, batch_tokens=1, whole_model=True),
        "offload": CollectOptions(PACKED, batch_tokens=1, offload=tmp_path / "states"),
        "large": CollectOptions(PACKED, batch_tokens=100),
        "double": CollectOptions(PACKED, batch_tokens=1, precision="float64"),
    }
    for name, options in variants.items():
        collect(MODEL, output=tmp_path / f"{name}.safetensors", options=options, run=CPU)
    expected = matrices(reference)
    for name in ("whole", "offload"):
        ours = matrices(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(ours[module], expected[module]) for module in expected), name
    assert worst(matrices(tmp_path / "large.safetensors"), expected) < 2e-2  # bfloat16 hidden states in other batches
    assert worst(matrices(tmp_path / "double.safetensors"), expected) < 1e-6
    assert list((tmp_path / "states").iterdir()) == []


@pytest.mark.parametrize("experts", ["shared", "each"])
def test_inputs_of_experts_are_those_of_the_tokens_that_reach_them(experts: Any, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", tmp_path / "model")
    options = CollectOptions(
        TEXT, targets=("experts.gate_up_proj", "experts.down_proj"), experts=experts, normalization="none"
    )
    collect(folder, output=tmp_path / "covs.safetensors", options=options, run=CPU)
    ours = matrices(tmp_path / "covs.safetensors")
    model, sums = load(folder, torch.float64, experts_implementation="eager"), {}

    def add(name: str, rows: torch.Tensor) -> None:
        if len(rows):
            sums[name] = sums.get(name, 0) + rows.T @ rows

    def see(name: str, module: Any, args: Any) -> None:
        hidden, chosen = args[0], args[1]
        if experts == "shared":
            add(name, hidden)
        for expert in range(4):
            rows = hidden[(chosen == expert).any(dim=-1)]
            gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            add(f"{name}.down_proj" if experts == "shared" else f"{name}.{expert}.down_proj", inner)
            if experts == "each":
                add(f"{name}.{expert}", rows)

    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda module, args, name=name: see(name, module, args))
    with torch.no_grad():
        for sample in samples(folder, TEXT):
            model(input_ids=torch.tensor([sample]))
    assert worst(ours, sums) < 1e-5


def test_decompose_takes_what_collect_wrote_for_experts(done: Command, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", tmp_path / "model")
    targets = ("--target", "experts.gate_up_proj", "--target", "experts.down_proj", "--target", "q_proj")
    text = ("--data", TASK, "--field", "question", "--no-pack", "--samples", 20)
    done("collect", folder, *text, *targets, "-o", tmp_path / "covs", "--max-shard-size", "20kB")
    assert len(list((tmp_path / "covs").glob("*.safetensors"))) > 1
    ranks = ("--mode", "ipm", "--rank", 4)
    done("decompose", folder, "--cov", tmp_path / "covs", *ranks, *targets, "-o", tmp_path / "residual")


def arguments(output: Path, *more: object) -> tuple[object, ...]:
    text = ("--data", TASK, "--field", "question", "--field", "answer", "--no-pack", "--samples", 9)
    return "collect", MODEL, *text, *more, "-o", output


def test_a_run_that_was_interrupted_goes_on_at_its_block(
    done: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corda_convert.operations.collect_stage import Stage
    from corda_convert.streaming.stream import LayerStream

    done(*arguments(tmp_path / "straight.safetensors"))
    run_block = LayerStream.run_block

    def stopping(stream: LayerStream, index: int, *rest: Any) -> None:
        if index == 3:
            raise KeyboardInterrupt
        run_block(stream, index, *rest)

    output = tmp_path / "covs.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "run_block", stopping)
        ran = command(*arguments(output))
    assert ran.status == 130
    assert "Run the same command again to go on" in ran.err
    assert not output.exists()
    other = command(*arguments(output, "--normalize", "none"))
    assert other.status == 1
    assert "Since then changed: options" in other.err
    hooked = []
    add = Stage._add
    monkeypatch.setattr(Stage, "_add", lambda stage, name, inputs: (hooked.append(name), add(stage, name, inputs)))
    done(*arguments(output))
    assert {name.split(".")[2] for name in hooked} == {"3", "4", "5"}
    assert output.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_part_that_was_damaged_is_collected_again(
    done: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corda_convert.operations import collect as operation

    done(*arguments(tmp_path / "straight.safetensors"))
    output = tmp_path / "covs.safetensors"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(operation, "seal", stop)
        assert command(*arguments(output)).status == 130
    (note,) = (json.loads(path.read_text()) for path in tmp_path.glob(".covs*/part-00002.json"))
    draft = next(tmp_path.glob(".covs*/draft-00001.safetensors"))
    with draft.open("r+b") as stream:
        stream.seek(note["note"]["tensors"][0][-1])
        stream.write(b"?")
    done(*arguments(output))
    assert output.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


@pytest.mark.skipif("CORDA_CONVERT_KILLS" not in os.environ, reason="long; see the Makefile")
def test_several_processes_write_the_bytes_of_one(done: Command, tmp_path: Path) -> None:
    from test_distributed import run

    done(*arguments(tmp_path / "one.safetensors"))
    status, out, err = run(2, *arguments(tmp_path / "two.safetensors"))
    assert status == 0, err
    assert "24 distinct ones of 42 modules" in out
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["knowledge", "task"])
def test_files_of_peft_become_ours_with_the_same_bits(kind: str, done: Command, tmp_path: Path) -> None:
    source = FIXTURES / "covariances" / f"{kind}.peft.pt"
    done("collect", "--from-peft", source, "-o", tmp_path / "covs.safetensors")
    theirs = torch.load(source, weights_only=True)
    ours = matrices(tmp_path / "covs.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = read_covariances(tmp_path / "covs.safetensors")
    assert (len(found.matrices), len(found.aliases)) == (24, 18)


def test_the_authors_scaling_cache_becomes_mean_absolute_inputs(done: Command, tmp_path: Path) -> None:
    vectors = {f"model.layers.{layer}.self_attn.q_proj": torch.rand(96) for layer in range(6)}
    torch.save(vectors, tmp_path / "model_calib_input_distribution_abs_mean.pt")
    done(
        "collect",
        "--from-peft",
        tmp_path / "model_calib_input_distribution_abs_mean.pt",
        "-o",
        tmp_path / "s.safetensors",
    )
    found = read_covariances(tmp_path / "s.safetensors")
    assert not found.matrices
    assert all(torch.equal(read_tensor(found.scales[name]), vector) for name, vector in vectors.items())


def test_too_few_tokens_are_warned_of_with_the_numbers(command: Command, tmp_path: Path) -> None:
    ran = command(*arguments(tmp_path / "covs.safetensors"))
    assert "There are 492 tokens, 2.8 for each of the 176 inputs of model.layers.0.mlp.down_proj" in ran.err.replace(
        "\n", " "
    )
    assert "Collect 1,760 or more" in ran.err


def test_sums_that_wait_for_the_next_block_count_with_those_it_needs() -> None:
    from corda_convert.operations.collect_job import sums_at_most

    assert sums_at_most([[2, 2, 3], [2, 2, 3]], are_kept=True) == 12 * (4 + 4 + 9)
    assert sums_at_most([[2, 2], [3], [3, 3], []], are_kept=True) == 12 * max(4 + 4 + 9, 9 + 9)
    assert sums_at_most([[2, 2], [3], [3, 3], []], are_kept=False) == 12 * (9 + 9)


def test_a_dry_run_tells_bytes_and_writes_nothing(done: Command, tmp_path: Path) -> None:
    ran = done(*arguments(tmp_path / "covs.safetensors", "--dry-run", "--json"))
    plan = json.loads(ran.out)["plan"]
    assert plan["modules"] == 42
    assert 0 < plan["disk_bytes"]["output_at_most"] - 6 * (6 * 97 * 96 + 177 * 176) * 4 < 1 << 17
    assert plan["host_bytes"]["hidden_states"] == 492 * 96 * 2
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_collected_is_refused_and_leaves_nothing(refusal: Command, tmp_path: Path) -> None:
    assert "matches no Linear layer" in refusal(*arguments(Path("x"), "--target", "nonsense")[:-2])
    assert "There is no file of text" in refusal("collect", MODEL, "--data", tmp_path / "none.jsonl")
    folder = tiny("llama", tmp_path / "model")
    tensors = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = ("--data", TASK, "--field", "question", "--no-pack", "--samples", 3)
    message = refusal("collect", folder, *text)
    assert message.startswith("The input of model.layers.1.self_attn.q_proj holds NaN or Inf for sample ")


def test_an_output_that_is_there_is_kept(command: Command, done: Command, tmp_path: Path) -> None:
    output = tmp_path / "covs.safetensors"
    output.write_bytes(b"mine")
    assert "exists already" in command(*arguments(output)).err
    assert "was not made by corda-convert collect" in command(*arguments(output, "--overwrite")).err
    assert output.read_bytes() == b"mine"
    output.unlink()
    done(*arguments(output))
    done(*arguments(output, "--normalize", "none", "--overwrite"))
    assert read_covariances(output).metadata["normalization"] == "none"


def test_options_without_effect_are_refused(command: Command, tmp_path: Path) -> None:
    source = FIXTURES / "covariances" / "task.peft.pt"
    ran = command("collect", "--from-peft", source, "--samples", 3, "-o", tmp_path / "covs.safetensors")
    assert ran.status == 2
    assert "leave out --samples" in ran.err
    with pytest.raises(CordaConvertError, match="--whole-model has none"):
        options = CollectOptions(TEXT, whole_model=True, offload=tmp_path)
        collect(MODEL, output=tmp_path / "covs.safetensors", options=options, run=CPU)


def test_python_gives_the_receipt(tmp_path: Path) -> None:
    collected = collect(
        MODEL, output=tmp_path / "c.safetensors", options=CollectOptions(TEXT, targets=("q_proj",)), run=CPU
    )
    assert isinstance(collected, Collected)
    assert collected.receipt["summary"]["tensors"] == {"collected": 6}
    assert collected.receipt["files"][0]["bytes"] == (tmp_path / "c.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [40, 512, 1100])
def test_half_of_a_product_is_the_whole_one(width: int, dtype: torch.dtype) -> None:
    from corda_convert.linalg.bfloat16_gram import add_gram_of_columns, columns_of
    from corda_convert.linalg.gram import add_gram, symmetric
    from corda_convert.linalg.threads import Team

    rows = torch.randn(300, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    upper, whole = torch.full((width, width), torch.nan), torch.empty(width, width)
    with Team(upper.device) as team:
        for is_first in (True, False):
            if dtype == torch.float32:
                add_gram(team, upper, rows, 0.5, is_first=is_first)
            else:
                columns = columns_of(team, rows, torch.empty(width, 300))
                add_gram_of_columns(team, columns, 0.5, group=upper, is_first=is_first)
        symmetric(team, upper, whole, 4)
    upper = whole
    expected = 0.25 * rows.double().T @ rows.double()
    assert (upper - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.equal(upper, upper.T)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
