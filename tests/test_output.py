"""What is left on disk: all of an output or nothing, the files beside the weights, the receipt and the card."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    HIDDEN,
    LINEARS,
    LLAMA_CONFIG,
    MODEL,
    RESIDUAL,
    UP,
    files_below,
    llama_tensors,
    random,
    read_json,
    write_checkpoint,
    write_json,
    write_lora,
)
from conftest import Ran, assert_no_leftovers, checked_refusal
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corda_convert.errors import MalformedFile, OutputRefused
from corda_convert.output import staging
from corda_convert.output.receipt import read_receipt
from corda_convert.output.side_files import collect_side_files, config_with_dtype
from corda_convert.output.staging import STAGING_SUFFIX, check_space, staging_folder

Command = Callable[..., Ran]

RECEIPT = "corda_convert.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=2)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora")


# Staging


def test_an_output_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staging_folder(output) as folder:
        (folder / "a").write_text("new")
        assert folder.parent.name == f".out{STAGING_SUFFIX}"
        assert not output.exists()
    assert files_below(output) == {"a": b"new"}
    assert_no_leftovers(output.parent)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_removes_the_staging_folder_and_leaves_the_old_output(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    output = tmp_path / "out"
    write_json(output / "old.json", 1)
    before = files_below(output)
    with pytest.raises(failure), staging_folder(output) as folder:
        write_json(folder / "sub" / "new.json", 2)
        raise failure
    assert files_below(output) == before
    assert_no_leftovers(tmp_path)


def test_a_refusal_of_the_file_system_is_one_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputRefused, match=r"Writing .* failed: .*No space left on device"),
        staging_folder(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_old_output_is_replaced_as_a_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_json(output / "old.json", 1)
    with staging_folder(output) as folder:
        (folder / "new").write_text("new")
        assert (output / "old.json").exists()
    assert files_below(output) == {"new": b"new"}
    assert_no_leftovers(tmp_path)


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staging_folder(output) as folder:
        (folder / "a").write_text("first")
        with pytest.raises(OutputRefused) as refused, staging_folder(output):
            pass
        assert str(refused.value) == (
            f"Another run of corda-convert is writing {output}.\nWait for it, or choose another -o."
        )
        assert files_below(folder) == {"a": b"first"}
    assert files_below(output) == {"a": b"first"}
    with staging_folder(output) as folder:
        (folder / "b").write_text("second")
    assert files_below(output) == {"b": b"second"}


def test_a_second_program_is_refused_while_the_first_one_writes(model: Path, lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["merge", str(model), "--adapter", str(lora), "-o", str(output)]
    with staging_folder(output) as folder:
        (folder / "a").write_text("first")
        second = subprocess.run([sys.executable, "-m", "corda_convert", *arguments], capture_output=True, text=True)
    assert second.returncode == 1
    assert second.stderr.startswith(f"Error: Another run of corda-convert is writing {output}.")
    assert files_below(output) == {"a": b"first"}


KILLED = """
import os, signal, sys
from pathlib import Path
from corda_convert.output import staging
output = Path(sys.argv[1])
if sys.argv[2] == "replacing":
    rename = Path.rename
    def killed_between(self, target):
        if self.parent.name.endswith(staging.STAGING_SUFFIX):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.rename = killed_between
with staging.staging_folder(output) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "half").write_text("x")
    (folder / "link").symlink_to(output.parent)
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_leftovers_of_a_killed_run_are_removed_by_the_next_one(
    done: Command, model: Path, lora: Path, tmp_path: Path, moment: str
) -> None:
    output = tmp_path / "out"
    done("merge", model, "--adapter", lora, "-o", output)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(output), moment])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if STAGING_SUFFIX in path.name]
    done("merge", model, "--adapter", lora, "-o", output, "--overwrite")
    assert not (output / "sub").exists()
    assert (output / RECEIPT).is_file()
    assert_no_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "lora", "out"}


def test_too_little_space_is_refused_before_any_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "deep" / "out", 1)
    with pytest.raises(OutputRefused, match=r"The output needs .* GB free") as refused:
        check_space(tmp_path / "deep" / "out", free + 10**12)
    assert refused.value.next_step == "Free disk space, or choose another file system with -o."


@pytest.mark.parametrize(("limit", "what"), [(1000, "model-00001-of-00002.safetensors"), (30_000, "out")])
def test_a_write_that_fails_half_way_is_refused_and_leaves_nothing(
    model: Path, lora: Path, tmp_path: Path, limit: int, what: str
) -> None:
    (model / "tokenizer.json").write_bytes(bytes(100_000))
    output = tmp_path / "out"
    arguments = ["merge", str(model), "--adapter", str(lora), "-o", str(output)]
    failed = subprocess.run(
        [sys.executable, "-m", "corda_convert", *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    message = checked_refusal(Ran(failed.returncode, failed.stdout, failed.stderr), output)
    assert re.match(rf"Writing (.*/)?{what} failed: .*File too large", message), message


def test_overwrite_replaces_an_output_of_ours(done: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done("merge", model, "--adapter", lora, "-o", output)
    first = files_below(output)
    (output / "stale.txt").write_text("of the first run")
    other = write_lora(tmp_path / "other", seed=7)
    done("merge", model, "--adapter", other, "-o", output, "--overwrite")
    second = files_below(output)
    assert second.keys() == first.keys()
    assert second["model-00001-of-00002.safetensors"] != first["model-00001-of-00002.safetensors"]
    assert_no_leftovers(tmp_path)


def test_an_overwrite_that_fails_leaves_the_old_output(
    command: Command, done: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done("merge", model, "--adapter", lora, "-o", output)
    before = files_below(output)
    tensors = load_file(lora / "adapter_model.safetensors")
    tensors[f"base_model.model.{UP}.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, lora / "adapter_model.safetensors")
    ran = command("merge", model, "--adapter", lora, "-o", output, "--overwrite")
    assert ran.status == 1
    assert "holds NaN or Inf" in ran.err
    assert files_below(output) == before
    assert_no_leftovers(tmp_path)


def test_an_empty_folder_is_as_good_as_none(done: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    assert (tmp_path / "out" / RECEIPT).is_file()


def test_a_linked_output_is_written_where_the_link_points(
    done: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere" / "target").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "target")
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "target" / RECEIPT).is_file()
    assert_no_leftovers(tmp_path)
    assert_no_leftovers(tmp_path / "elsewhere")


# Side files

CARRIED = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b"{}",
    "modeling_special.py": b"raise SystemExit\n",
    "LICENSE": b"do as you like",
    "tokenizer/vocab, é.txt": "ü".encode(),
    "1_Pooling/config.json": b"{}",
    "modules.json": b"[]",
}
LEFT = {
    "README.md": b"# The base\n",
    "pytorch_model.bin": b"x",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.00.pth": b"x",
    "model.gguf": b"x",
    "tf_model.h5": b"x",
    "flax_model.msgpack": b"x",
    "onnx/model.onnx": b"x",
    "original/consolidated.safetensors": b"x",
    "training_args.bin": b"x",
    "optimizer.pt": b"x",
    "trainer_state.json": b"{}",
}


def add_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_side_files_are_carried_over_and_other_weights_are_listed_as_left(
    done: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    add_files(model, {**CARRIED, **LEFT, ".gitattributes": b"x", ".cache/x": b"x"})
    (model / "vocab.txt").symlink_to(model / "LICENSE")
    (model / "linked").symlink_to(tmp_path)
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    found = files_below(tmp_path / "out")
    assert {name: found[name] for name in CARRIED} == CARRIED
    assert found["vocab.txt"] == b"do as you like"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert found["config.json"] == (model / "config.json").read_bytes()
    shards = {path.name for path in model.glob("model-*.safetensors")}
    assert found.keys() == {
        *CARRIED, *shards, "vocab.txt", "config.json", "model.safetensors.index.json", "README.md", RECEIPT,
    }  # fmt: skip
    assert found["README.md"] != LEFT["README.md"]
    receipt = read_json(tmp_path / "out" / RECEIPT)
    assert sorted(receipt["not_carried_over"]) == sorted(LEFT)


def test_the_summary_names_what_was_left(done: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    add_files(model, {"pytorch_model.bin": b"x"})
    ran = done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    assert "  left     pytorch_model.bin: not carried over\n" in ran.out


def test_the_initial_adapter_of_a_residual_is_not_carried_into_the_merged_model(done: Command, tmp_path: Path) -> None:
    done("decompose", MODEL, "--cov", COVARIANCES, "--mode", "ipm", "--rank", 2, "-o", tmp_path / "residual")
    adapter = tmp_path / "residual" / "corda_init"
    done("merge", tmp_path / "residual", "--adapter", adapter, "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "corda_init").exists()
    assert read_json(tmp_path / "out" / RECEIPT)["command"] == "merge"


def test_the_tokenizer_of_the_adapter_wins(done: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    add_files(model, {"tokenizer.json": b"base", "chat_template.jinja": b"base", "generation_config.json": b"{}"})
    add_files(lora, {"tokenizer.json": b"mine", "special_tokens_map.json": b"{}", "generation_config.json": b"no",
                     "training_args.bin": b"no", "optimizer.pt": b"no"})  # fmt: skip
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    found = files_below(tmp_path / "out")
    assert found["tokenizer.json"] == b"mine"
    assert found["special_tokens_map.json"] == b"{}"
    assert found["chat_template.jinja"] == b"base"
    assert found["generation_config.json"] == b"{}"
    assert not {"training_args.bin", "optimizer.pt", "adapter_config.json"} & found.keys()


def test_a_model_that_is_a_single_file_has_no_side_files(done: Command, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {f"{UP}.weight": random(*LINEARS[UP])}, config=None)
    add_files(model, CARRIED)
    lora = write_lora(tmp_path / "lora", {UP: LINEARS[UP]})
    done("merge", model / "model.safetensors", "--adapter", lora, "-o", tmp_path / "out")
    assert files_below(tmp_path / "out").keys() == {"model.safetensors", "README.md", RECEIPT}


# Config and index


def test_the_dtype_of_the_config_is_changed_at_every_level() -> None:
    config = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "deeper": {"torch_dtype": "float16"}},
        "vision_config": {"hidden_size": 3, "dtype": None},
        "rope": {"type": "default"},
    }
    before = json.dumps(config)
    assert config_with_dtype(config, "bfloat16") == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "deeper": {"torch_dtype": "bfloat16"}},
        "vision_config": {"hidden_size": 3, "dtype": None},
        "rope": {"type": "default"},
    }
    assert json.dumps(config) == before
    assert config_with_dtype({"hidden_size": 3}, "float16") == {"hidden_size": 3, "dtype": "float16"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_changes_all_floating_point_tensors_and_the_config(
    done: Command, lora: Path, tmp_path: Path, dtype: str
) -> None:
    tensors = {**llama_tensors(dtype=torch.bfloat16), "model.steps": torch.arange(3), "model.empty": random(0, 4)}
    tensors["model.scale"] = torch.tensor(2.0)
    config = {**LLAMA_CONFIG, "dtype": "bfloat16", "nested": {"torch_dtype": "bfloat16"}}
    model = write_checkpoint(tmp_path / "model", tensors, shards=2, config=config)
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out", "--dtype", dtype)
    written = read_json(tmp_path / "out" / "config.json")
    assert written == {**config, "dtype": dtype, "nested": {"torch_dtype": dtype}}
    found: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "out").glob("model-*.safetensors"):
        found |= load_file(shard)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.shape == tensors[name].shape
        assert tensor.dtype == (torch.int64 if name == "model.steps" else getattr(torch, dtype))
        if name.removesuffix(".weight") not in LINEARS:
            assert tensor.equal(tensors[name].to(tensor.dtype))
    actions = {entry["name"]: entry["action"] for entry in read_json(tmp_path / "out" / RECEIPT)["tensors"]}
    unchanged = "copied" if dtype == "bfloat16" else "cast"
    assert actions["model.scale"] == "cast" if dtype != "float32" else "copied"
    assert actions["model.norm.weight"] == unchanged
    assert actions["model.steps"] == "copied"
    assert actions[f"{UP}.weight"] == "folded"


def test_without_dtype_every_tensor_keeps_its_own(done: Command, lora: Path, tmp_path: Path) -> None:
    tensors = llama_tensors(dtype=torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].double()
    model = write_checkpoint(tmp_path / "model", tensors)
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_index_counts_the_bytes_of_the_tensors_and_keeps_what_else_it_said(
    done: Command, model: Path, lora: Path, tmp_path: Path, dtype: str | None
) -> None:
    index = read_json(model / "model.safetensors.index.json")
    index["metadata"] |= {"total_parameters": 17, "total_size": 1}
    write_json(model / "model.safetensors.index.json", index)
    options = [] if dtype is None else ["--dtype", dtype]
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out", *options)
    written = read_json(tmp_path / "out" / "model.safetensors.index.json")
    size = sum(tensor.numel() for tensor in llama_tensors().values()) * (4 if dtype is None else 2)
    assert written["metadata"] == {"total_parameters": 17, "total_size": size}
    assert written["weight_map"] == index["weight_map"]


def test_a_model_in_one_file_gets_no_index(done: Command, lora: Path, tmp_path: Path) -> None:
    done("merge", write_checkpoint(tmp_path / "model"), "--adapter", lora, "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_the_metadata_and_the_order_of_each_shard_are_kept(
    done: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    for shard in model.glob("*.safetensors"):
        with safe_open(shard, "pt") as before, safe_open(tmp_path / "out" / shard.name, "pt") as after:
            assert after.metadata() == before.metadata() == {"format": "pt"}
            assert after.offset_keys() == before.offset_keys()


# Receipt

OUTPUTS: dict[str, tuple[object, ...]] = {
    "merge": ("merge", MODEL, "--adapter", ADAPTERS / "lora_modules_to_save", "--as-is"),
    "merge with init": (
        "merge", MODEL, "--adapter", ADAPTERS / "corda", "--init", RESIDUAL / "corda_init", "--dtype", "float32"
    ),
    "decompose": ("decompose", MODEL, "--cov", COVARIANCES, "--mode", "kpm", "--rank", 4, "--alpha", 6),
    "to-lora": ("to-lora", ADAPTERS / "corda", "--init", RESIDUAL / "corda_init", "--base", "someone/base"),
}  # fmt: skip
TOKEN = "hf_" + 34 * "x"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One output of every command, made with absolute paths and a token in the environment."""
    from corda_convert.cli import main

    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        for name, arguments in OUTPUTS.items():
            with pytest.raises(SystemExit) as exit_:
                main([*(str(argument) for argument in arguments), "-o", str(folder / name), "-q"])
            assert exit_.value.code == 0
    return {name: folder / name for name in OUTPUTS}


def receipt_of(folder: Path) -> dict[str, Any]:
    receipt = read_receipt(folder)
    assert receipt is not None
    return receipt


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_receipt_lists_every_tensor_once_with_what_was_done_to_it(outputs: dict[str, Path], name: str) -> None:
    receipt = receipt_of(outputs[name])
    found = {}
    for path in outputs[name].rglob("*.safetensors"):
        with safe_open(path, "pt") as stream:
            for key in stream.keys():  # noqa: SIM118 - no mapping
                view = stream.get_slice(key)
                place = path.relative_to(outputs[name]).as_posix()
                found[key] = (place, view.get_dtype(), view.get_shape())
    entries = receipt["tensors"]
    assert {entry["name"]: (entry["file"], entry["dtype"], entry["shape"]) for entry in entries} == found
    assert len(entries) == len(found)
    if name != "to-lora":
        base = read_json(MODEL / "model.safetensors.index.json")["weight_map"]
        assert base.keys() <= found.keys()
    allowed = {
        "merge": {"copied", "folded", "replaced"},
        "merge with init": {"cast", "folded"},
        "decompose": {"copied", "decomposed"},
        "to-lora": {"concatenated"},
    }
    assert {entry["action"] for entry in entries} == allowed[name]
    counted: dict[str, int] = {}
    for entry in entries:
        if "with" in entry:
            assert entry["with"] in found
        else:
            counted[entry["action"]] = counted.get(entry["action"], 0) + 1
    assert receipt["summary"]["tensors"] == counted == receipt["plan"]["tensors"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_receipt_lists_every_file_with_its_size_and_digest(outputs: dict[str, Path], name: str) -> None:
    files = files_below(outputs[name])
    del files[RECEIPT]
    assert {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in receipt_of(outputs[name])["files"]} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
    }


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_inputs_stand_in_the_receipt_with_true_digests(outputs: dict[str, Path], name: str) -> None:
    known = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in [*MODEL.glob("*.safetensors"), COVARIANCES]
    }
    for source in receipt_of(outputs[name])["inputs"]:
        for file in source["files"]:
            folder = {
                "adapter": Path(str(OUTPUTS[name][3 if name != "to-lora" else 1])),
                "init": RESIDUAL / "corda_init",
            }
            if source["role"] in folder:
                content = (folder[source["role"]] / file["name"]).read_bytes()
                assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
            else:
                assert file["sha256"] in (known[file["name"]], None)
            assert re.fullmatch("[0-9a-f]{64}", file["header_sha256"])
    roles = {"merge": ["model", "adapter"], "merge with init": ["model", "adapter", "init"],
             "decompose": ["model", "covariances"], "to-lora": ["adapter", "init"]}  # fmt: skip
    assert [source["role"] for source in receipt_of(outputs[name])["inputs"]] == roles[name]


@pytest.mark.parametrize("name", OUTPUTS)
def test_receipt_and_card_hold_no_absolute_path_and_no_token(outputs: dict[str, Path], name: str) -> None:
    for file in (RECEIPT, "README.md"):
        text = (outputs[name] / file).read_text(encoding="utf-8")
        assert TOKEN not in text
        for path in (outputs[name].parent, MODEL.parent, Path.home()):
            assert f"{path}/" not in text
    strings = [value for value in walk(receipt_of(outputs[name])) if value.startswith("/")]
    assert strings == []


def walk(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (str(key), *walk(item))]
    if isinstance(value, list):
        return [text for item in value for text in walk(item)]
    return [value] if isinstance(value, str) else []


def test_an_absolute_path_in_the_adapters_config_does_not_reach_the_receipt(
    done: Command, model: Path, tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "lora", base_model_name_or_path="/secret/home/of/someone/base")
    ran = done("merge", model, "--adapter", adapter, "-o", tmp_path / "out")
    assert ran.err == ('Note: lora names "base" as its base; it is merged into model, where every module fits.\n')
    for content in files_below(tmp_path / "out").values():
        assert b"/secret" not in content


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not valid JSON"), (b"{}", "is no receipt of corda-convert."),
     (b'{"format": "corda_convert.receipt", "format_version": 99}', "has the receipt version 99; this program knows 1.")],
)  # fmt: skip
def test_a_damaged_or_newer_receipt_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / RECEIPT).write_bytes(content)
    with pytest.raises(MalformedFile, match=re.escape(message)):
        read_receipt(tmp_path)
    (tmp_path / RECEIPT).unlink()
    assert read_receipt(tmp_path) is None


# Card


def snippet_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)\n```\n", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_card_has_front_matter_that_the_hub_understands_and_a_snippet_that_is_python(
    outputs: dict[str, Path], name: str
) -> None:
    card = ModelCard.load(outputs[name] / "README.md")
    expected = {
        "merge": "transformers",
        "merge with init": "transformers",
        "decompose": "transformers",
        "to-lora": "peft",
    }
    assert card.data.library_name == expected[name]
    assert "corda-convert" in card.data.tags
    assert card.data.base_model == ("someone/base" if name == "to-lora" else None)
    assert card.text.lstrip().startswith(f"# {name}\n")
    compile(snippet_of(outputs[name]), "snippet", "exec")
    assert f'from_pretrained("{name}")' in snippet_of(outputs[name]) or f', "{name}"' in snippet_of(outputs[name])


def test_the_base_stands_in_the_front_matter_when_the_config_names_it_by_a_hub_id(
    done: Command, lora: Path, tmp_path: Path
) -> None:
    config = {**LLAMA_CONFIG, "_name_or_path": "someone/base-7b"}
    model = write_checkpoint(tmp_path / "model", config=config)
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/base-7b", "finetune")


@pytest.mark.parametrize("name", ['a "quoted" name', "back\\slash", "{repo}", "ünï", "a'b", "``` x"])
def test_the_snippet_is_python_for_any_folder_name(
    done: Command, model: Path, lora: Path, tmp_path: Path, name: str
) -> None:
    done("merge", model, "--adapter", lora, "-o", tmp_path / name)
    snippet = snippet_of(tmp_path / name)
    compile(snippet, "snippet", "exec")
    assert name in {node.value for node in constants(snippet)}


def test_the_snippet_is_python_for_any_base_name(done: Command, lora: Path, tmp_path: Path) -> None:
    trained = write_lora(tmp_path / "trained")
    done("to-lora", trained, "--init", lora, "--base", 'my "own" base\\', "-o", tmp_path / "out")
    assert 'my "own" base\\' in {node.value for node in constants(snippet_of(tmp_path / "out"))}


def constants(code: str) -> list[Any]:
    import ast

    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


def test_files_are_readable_by_others_as_the_umask_says(done: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_the_helpers_of_this_module_look_where_the_program_writes(model: Path) -> None:
    from corda_convert.checkpoint.folder import read_checkpoint

    assert staging.STAGING_SUFFIX.startswith(".corda-convert-")
    found = collect_side_files(read_checkpoint(model))
    assert ([file.name for file in found.carried], found.left) == (["config.json"], ())
    assert read_json(model / "config.json")["hidden_size"] == HIDDEN
