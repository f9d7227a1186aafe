"""Code from strangers never runs: not in a pickle, wherever one is read, and not beside a model that names it."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import (
    LINEARS,
    LLAMA_CONFIG,
    files_below,
    llama_tensors,
    random,
    write_checkpoint,
    write_covariances,
    write_json,
    write_lora,
)
from conftest import Ran, assert_no_leftovers

from corda_convert.cli.group import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about a config that it does not know

Command = Callable[..., Ran]

PACKAGE = Path(cli.callback.__code__.co_filename).parent.parent if cli.callback else Path()
MODEL_OPTIONS = ("--method", "svd", "--mode", "ipm", "--rank", "2")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.target), "w"))


def places(folder: Path) -> dict[str, tuple[Path, list[object]]]:
    """Every place where a pickle is read: the file, and the command that reads it."""
    model = write_checkpoint(folder / "model")
    lora = write_lora(folder / "lora")
    pickled_lora = write_lora(folder / "pickled_lora")
    (pickled_lora / "adapter_model.safetensors").unlink()
    pickled = write_checkpoint(folder / "pickled")
    (pickled / "model.safetensors").unlink()
    sharded = write_checkpoint(folder / "sharded")
    (sharded / "model.safetensors").unlink()
    shard = "pytorch_model-00001-of-00001.bin"
    write_json(
        sharded / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": dict.fromkeys(llama_tensors(), shard)}
    )
    covariances = write_covariances(folder / "covariances.safetensors")
    decompose = ["decompose", model, "--mode", "kpm", "--rank", "2"]
    adapter_bin = pickled_lora / "adapter_model.bin"
    return {
        "adapter": (adapter_bin, ["merge", model, "--adapter", pickled_lora]),
        "initial adapter": (adapter_bin, ["merge", model, "--adapter", lora, "--init", pickled_lora]),
        "initial adapter of to-lora": (adapter_bin, ["to-lora", lora, "--init", pickled_lora]),
        "adapter of to-lora": (adapter_bin, ["to-lora", pickled_lora, "--rank", "2"]),
        "model": (pickled / "pytorch_model.bin", ["merge", pickled, "--adapter", lora]),
        "model of decompose": (pickled / "pytorch_model.bin", ["decompose", pickled, *MODEL_OPTIONS]),
        "shard": (sharded / shard, ["merge", sharded, "--adapter", lora]),
        "base": (
            pickled / "pytorch_model.bin",
            ["to-lora", "--from-checkpoints", pickled, model, "--rank", "2"],
        ),
        "tuned": (
            pickled / "pytorch_model.bin",
            ["to-lora", "--from-checkpoints", model, pickled, "--rank", "2"],
        ),
        "residual": (
            pickled / "pytorch_model.bin",
            ["to-lora", lora, "--base", model, "--residual", pickled],
        ),
        "pth model": (folder / "model.pth", ["merge", folder / "model.pth", "--adapter", lora]),
        "rwkv adapter": (folder / "rwkv.pth", ["merge", model, "--adapter", folder / "rwkv.pth"]),
        "covariances": (folder / "covariances.pt", [*decompose, "--cov", folder / "covariances.pt"]),
        "weighting": (
            folder / "weighting.pt",
            ["to-lora", lora, "--rank", "2", "--weight-by", folder / "weighting.pt"],
        ),
        "cache": (folder / "cache.pt", ["decompose", model, "--mode", "kpm", "--from-cache", folder / "cache.pt"]),
        "initial cache": (folder / "cache.pt", ["merge", model, "--adapter", lora, "--init", folder / "cache.pt"]),
        "inspect": (folder / "thing.pt", ["inspect", folder / "thing.pt"]),
        "inspect a folder": (pickled / "pytorch_model.bin", ["inspect", pickled]),
        "sound": (folder / "unused.pt", [*decompose, "--cov", covariances]),
    }


NAMES = (
    "adapter", "initial adapter", "initial adapter of to-lora", "adapter of to-lora", "model", "model of decompose",
    "shard", "base", "tuned", "residual", "pth model", "rwkv adapter", "covariances", "weighting", "cache",
    "initial cache", "inspect", "inspect a folder",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "writer"), [*((name, "torch") for name in NAMES), ("adapter", "pickle"), ("model", "pickle")]
)
def test_code_in_a_pickle_does_not_run(command: Command, tmp_path: Path, name: str, writer: str) -> None:
    found = places(tmp_path / "inputs")
    assert set(NAMES) == set(found) - {"sound"}
    path, arguments = found[name]
    target = tmp_path / "it-ran"
    if writer == "torch":
        torch.save({f"{next(iter(LINEARS))}.weight": random(2, 2), "bomb": Bomb(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"bomb": Bomb(target)}))
    before = files_below(tmp_path)
    output = [] if arguments[0] == "inspect" else ["-o", tmp_path / "out"]
    ran = command(*arguments, *output)
    assert not target.exists()
    assert (ran.status, ran.out) == (1, "")
    assert "can be loaded safely" in ran.err
    assert files_below(tmp_path) == before
    assert_no_leftovers(tmp_path)


def test_the_bomb_of_these_tests_goes_off_where_pickles_are_trusted(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it-ran"))).close()
    assert (tmp_path / "it-ran").exists()


def test_a_pickle_that_asks_for_memory_is_refused_without_giving_it(command: Command, tmp_path: Path) -> None:
    """`bytearray` is among what `weights_only` allows; its argument is a number of bytes."""

    class Large:
        def __reduce__(self) -> tuple[object, ...]:
            return (bytearray, (8 << 30,))

    path = tmp_path / "large.pt"
    torch.save({"x": random(2, 2), "y": Large()}, path)
    ran = command("inspect", path)
    assert (ran.status, ran.out) == (1, "")
    assert "can be loaded safely" in ran.err


CALLS = re.compile(r"torch\.load\([^)]*\)|pickle\.loads?\(|Unpickler\(|np\.load\(|joblib|\bexec\(|\beval\((?!\))")


def test_the_package_loads_pickles_with_weights_only_and_nothing_else() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert len(sources) > 100
    calls = [(path.name, found) for path, text in sources.items() for found in CALLS.findall(text)]
    assert ("pickle_file.py", "torch.load(skeleton, weights_only=True)") in calls
    assert [
        (name, call) for name, call in calls if "weights_only=True" not in call and "torch.load(..." not in call
    ] == []


COMMANDS_ON_MODELS = {
    "merge": ["merge", "MODEL", "--adapter", "LORA"],
    "decompose": ["decompose", "MODEL", *MODEL_OPTIONS],
    "to-lora": ["to-lora", "LORA", "--base", "MODEL", "--rank", "2"],
    "inspect": ["inspect", "MODEL"],
    "collect": ["collect", "MODEL", "--data", "TEXT"],
    "perplexity": ["perplexity", "MODEL", "--data", "TEXT"],
    "inspect an adapter": ["inspect", "LORA", "--base", "MODEL"],
}


@pytest.mark.parametrize("name", COMMANDS_ON_MODELS)
@pytest.mark.parametrize("kind", ["made_up", "llama"])
def test_code_beside_a_model_does_not_run(command: Command, tmp_path: Path, name: str, kind: str) -> None:
    target = tmp_path / "it-ran"
    mapped = {
        auto: f"modeling.{made}"
        for auto, made in {
            "AutoConfig": "MadeUpConfig",
            "AutoModel": "MadeUp",
            "AutoModelForCausalLM": "MadeUp",
            "AutoTokenizer": "MadeUpTokenizer",
        }.items()
    }
    changes = {"auto_map": mapped, "model_type": kind, "architectures": ["MadeUp"]}
    model = write_checkpoint(tmp_path / "model", config={**LLAMA_CONFIG, **changes})
    write_json(model / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling.MadeUpTokenizer", None]}})
    lora = write_lora(tmp_path / "lora")
    for folder in (model, lora):
        (folder / "modeling.py").write_text(f"open({str(target)!r}, 'w')\n")
    (tmp_path / "text.txt").write_text("a b c " * 100)
    given = {"MODEL": model, "LORA": lora, "TEXT": tmp_path / "text.txt"}
    output = [] if name.startswith(("inspect", "perplexity")) else ["-o", tmp_path / "out"]
    ran = command(*(given.get(argument, argument) for argument in COMMANDS_ON_MODELS[name]), *output)
    assert ran.status in (0, 1)
    assert "Traceback" not in ran.err
    assert not target.exists()
