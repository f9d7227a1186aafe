"""Small valid inputs of every kind, the commands that read them, and what must be true of whatever comes out."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import float64_oracle as oracle
import torch
from building import (
    LINEARS,
    UP,
    covariance,
    covariance_tensors,
    read_json,
    write_checkpoint,
    write_covariances,
    write_lora,
)
from float64_oracle import AdapterFiles, Meaningless
from fuzzing.mutations import Draw, mutate, restore
from safetensors.torch import load_file

from corda_convert.cli import main
from corda_convert.output import journal

SECONDS = 20
"""No case may take longer, on a machine that is busy otherwise."""

RECEIPT = "corda_convert.json"
LORA_FILES = ("adapter_model.safetensors", "adapter_config.json")


class Wrong(AssertionError):
    """A case broke a promise."""


class Hang(BaseException):
    """A case took too long. No `Exception`, so that nothing catches it on the way."""


@dataclass(frozen=True)
class Target:
    """A file that is damaged, and the commands that read it, by their names in `Workspace.commands`."""

    file: str
    commands: tuple[str, ...]


TARGETS: dict[str, Target] = {
    "shard": Target("model/model-00001-of-00002.safetensors", ("inspect model", "plan merge", "merge", "decompose")),
    "index": Target("model/model.safetensors.index.json", ("inspect model", "plan merge", "merge")),
    "model config": Target("model/config.json", ("inspect model", "plan merge", "merge", "decompose")),
    "adapter": Target("lora/adapter_model.safetensors", ("inspect lora", "plan merge", "merge", "to-lora")),
    "adapter config": Target("lora/adapter_config.json", ("inspect lora", "plan merge", "merge", "to-lora")),
    "covariances": Target("covariances.safetensors", ("inspect covariances", "decompose")),
    "pickled covariances": Target("covariances.pt", ("inspect pickled covariances", "decompose pickled")),
    "cache": Target("cache.pt", ("inspect cache", "from cache")),
    "pickled adapter": Target("pickled_lora/adapter_model.bin", ("inspect pickled lora", "merge pickled lora")),
    "pickled model": Target("pickled/pytorch_model.bin", ("inspect pickled", "merge pickled")),
    "rwkv adapter": Target("rwkv.pth", ("inspect rwkv", "merge rwkv")),
    "receipt": Target("sealed/corda_convert.json", ("inspect sealed", "push", "verify")),
    "sealed index": Target("sealed/model.safetensors.index.json", ("inspect sealed", "push", "verify")),
    "journal": Target("unfinished/.out.corda-convert-partial/journal/notes.jsonl", ("go on",)),
    "identity": Target("unfinished/.out.corda-convert-partial/identity.json", ("go on",)),
}


@dataclass
class Found:
    """What became of the cases."""

    accepted: int = 0
    refused: int = 0
    unjudged: int = 0
    told: set[str] = field(default_factory=set)


class Workspace:
    """The inputs in a folder of their own. One case at a time damages one file, which is restored afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = Found()
        folder.mkdir(parents=True)
        self._make_inputs()
        self.pristine = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.changed_ns = {path: path.stat().st_mtime_ns for path in self.pristine}
        self.outside = folder.parent / "outside"
        self.outside.mkdir()
        for path, content in self.pristine.items():
            copied = self.outside / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(content)

    def _make_inputs(self) -> None:
        folder = self.folder
        write_checkpoint(folder / "model", shards=2)
        write_lora(folder / "lora")
        write_lora(folder / "init", seed=700)
        write_covariances(folder / "covariances.safetensors", metadata={"tokens": "1000", "samples": "10"})
        write_covariances(folder / "covariances.pt", {**covariance_tensors(), UP: covariance(16)})
        pickled = write_checkpoint(folder / "pickled")
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
        adapter = write_lora(folder / "pickled_lora")
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        blocks = {f"{module}.disha": torch.ones(2, d_out) for module, (d_out, _) in LINEARS.items()}
        torch.save(blocks, folder / "rwkv.pth")
        write_cache(folder)
        self._must("merge", "-o", str(folder / "sealed"))
        self._leave_unfinished()

    def _must(self, command: str, *more: str) -> None:
        status, _, err = run([*self.commands[command], *more])
        assert status == 0, err

    def _leave_unfinished(self) -> None:
        """A merge that was interrupted before its receipt, and what it should have made."""
        from corda_convert.operations import production

        (self.folder / "unfinished").mkdir()
        before, journal.COMMIT_BYTES = journal.COMMIT_BYTES, 1
        seal = production.write_receipt

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        production.write_receipt = interrupt
        try:
            with contextlib.chdir(self.folder / "unfinished"):
                assert run(self.commands["go on"])[0] == 130
        finally:
            production.write_receipt, journal.COMMIT_BYTES = seal, before
        (notes,) = self.folder.glob("unfinished/.out.*/journal/*.jsonl")
        notes.rename(notes.with_name("notes.jsonl"))

    @property
    def commands(self) -> dict[str, list[str]]:
        folder = self.folder
        merge = ["merge", str(folder / "model"), "--adapter", str(folder / "lora")]
        decompose = ["decompose", str(folder / "model"), "--mode", "kpm", "--rank", "4", "--cov"]
        inspected = {
            "model": "model",
            "lora": "lora",
            "covariances": "covariances.safetensors",
            "pickled covariances": "covariances.pt",
            "cache": "cache.pt",
            "pickled lora": "pickled_lora",
            "pickled": "pickled",
            "rwkv": "rwkv.pth",
            "sealed": "sealed",
        }
        return {
            **{f"inspect {name}": ["inspect", str(folder / path)] for name, path in inspected.items()},
            "plan merge": [*merge, "--dry-run"],
            "merge": merge,
            "merge pickled": ["merge", str(folder / "pickled"), "--adapter", str(folder / "lora")],
            "merge pickled lora": ["merge", str(folder / "model"), "--adapter", str(folder / "pickled_lora")],
            "merge rwkv": ["merge", str(folder / "model"), "--adapter", str(folder / "rwkv.pth")],
            "decompose": [*decompose, str(folder / "covariances.safetensors")],
            "decompose pickled": [*decompose, str(folder / "covariances.pt")],
            "from cache": [
                "decompose",
                str(folder / "model"),
                "--from-cache",
                str(folder / "cache.pt"),
                "--mode",
                "kpm",
            ],
            "to-lora": ["to-lora", str(folder / "lora"), "--init", str(folder / "init"), "--as-is"],
            "push": ["push", str(folder / "sealed"), "owner/name"],
            "verify": ["verify", str(folder / "sealed")],
            "go on": [*merge, "-o", "out"],
        }

    def case(self, target_name: str, command: str, draws: Sequence[Draw]) -> None:
        """Damages the target's file and runs the command. Raises `Wrong`, `Hang`, or what the program did not catch."""
        target = TARGETS[target_name]
        path = self.folder / target.file
        try:
            mutate(path, draws, self.outside / target.file)
            if command == "go on":
                self._go_on()
            else:
                self._run(command)
        finally:
            if command == "go on":
                shutil.rmtree(self.folder / "unfinished")
                shutil.copytree(self.outside / "unfinished", self.folder / "unfinished")
            else:
                restore(path, self.pristine[path], self.changed_ns[path])

    def _run(self, command: str) -> None:
        output = self.folder / "output"
        writes = command.startswith(("plan", "merge", "decompose", "from", "to-lora"))
        before = names_below(self.folder)
        arguments = [*self.commands[command], *(["-o", str(output)] if writes else [])]
        try:
            if self._judged(*run(arguments)):
                self.found.accepted += 1
                if output.exists():
                    self._check_output(command, output)
            else:
                self.found.refused += 1
        finally:
            shutil.rmtree(output, ignore_errors=True)
        if names_below(self.folder) != before:
            raise Wrong(f"{command} left {names_below(self.folder) ^ before}")

    def _judged(self, status: int, out: str, err: str) -> bool:
        """Whether the command accepted its inputs. Raises `Wrong` for an end that is neither that nor a clear refusal."""
        if "Traceback" in err or "Traceback" in out:
            raise Wrong(err)
        if status == 0:
            return True
        if status not in (1, 2):
            raise Wrong(f"status {status}: {err}")
        if "Out of memory" in err:
            raise Wrong(err)
        if not out and ("Error: " not in err or len(err.strip()) < 10):
            raise Wrong(f"no message: {err!r}")
        if len(err) > 100_000:
            raise Wrong(f"a message of {len(err)} characters")
        self.found.told.add(err[:200])
        return False

    def _check_output(self, command: str, output: Path) -> None:
        """Raises `Wrong` where what was made is not what float64 makes of the damaged inputs."""
        check_sealed(output)
        if command in ("merge", "merge pickled lora", "merge pickled"):
            wrong = self._check_merge(command, output)
        elif command in ("decompose", "decompose pickled", "from cache"):
            wrong = check_decomposition(self.folder / "model", output)
        elif command == "to-lora":
            wrong = self._check_lora(output)
        else:
            wrong = []
        if wrong:
            raise Wrong(f"{command}: {wrong}")

    def _check_merge(self, command: str, output: Path) -> list[str]:
        model = self.folder / ("pickled" if command == "merge pickled" else "model")
        adapter = self.folder / ("pickled_lora" if command == "merge pickled lora" else "lora")
        try:
            tensors, factors = load_folder(model), load_folder(adapter)
        except RuntimeError:  # torch refuses the archive, but nothing that counts may have changed
            tensors, factors = (load_folder(self.outside / path.name) for path in (model, adapter))
        try:
            wanted = oracle.merged(
                tensors, loose_json(model), [AdapterFiles(factors, read_json(adapter / LORA_FILES[1]))]
            )
        except Meaningless as reason:
            return [f"means nothing: {reason}"]
        except Exception:  # configs of odd types, which the oracle does not look at
            self.found.unjudged += 1
            return []
        actual = load_folder(output)
        if actual.keys() != wanted.keys():
            return [f"other names: {sorted(actual.keys() ^ wanted.keys())}"]
        return [name for name, weight in wanted.items() if not weight.accepts(actual[name])]

    def _check_lora(self, output: Path) -> list[str]:
        trained, initial = AdapterDeltas(self.folder / "lora"), AdapterDeltas(self.folder / "init")
        made = AdapterDeltas(output)
        if made.modules != trained.modules:
            return [f"other modules: {sorted(made.modules ^ trained.modules)}"]
        try:
            wanted = {module: trained.delta(module) - initial.delta(module) for module in trained.modules}
        except Meaningless as reason:
            return [f"means nothing: {reason}"]
        return [module for module in made.modules if not close(made.delta(module), wanted[module])]

    def _go_on(self) -> None:
        """The end of an interrupted run: the right bytes, or a refusal that touches nothing."""
        place = self.folder / "unfinished"
        with contextlib.chdir(place):
            status, out, err = run(self.commands["go on"])
        if not self._judged(status, out, err):
            self.found.refused += 1
            if (place / "out").exists():
                raise Wrong("refused, and there is an output")
            return
        self.found.accepted += 1
        for path in (self.folder / "sealed").iterdir():
            if (
                path.name not in (RECEIPT, "README.md")
                and (place / "out" / path.name).read_bytes() != path.read_bytes()
            ):
                raise Wrong(f"{path.name} has other bytes than an undisturbed run's")
        ours, theirs = read_json(place / "out" / RECEIPT), read_json(self.folder / "sealed" / RECEIPT)
        for entry in (*ours["tensors"], *theirs["tensors"]):
            entry.pop("seconds", None)
        if ours["tensors"] != theirs["tensors"]:
            raise Wrong("the receipt says something else of the tensors")
        check_sealed(place / "out")
        if [path.name for path in place.iterdir()] != ["out"]:
            raise Wrong(f"left {list(place.iterdir())}")


def write_cache(folder: Path) -> None:
    """PEFT's cache of singular vectors, for a rank of 4."""
    tensors = load_folder(folder / "model")
    entries = {}
    for module in LINEARS:
        U, S, Vh = torch.linalg.svd(tensors[f"{module}.weight"], full_matrices=False)
        parts = {"S": S[:4], "U": U[:, :4], "V": Vh[:4].T}
        entries |= {f"{module}.eigens.{part}_WC": tensor.contiguous() for part, tensor in parts.items()}
    torch.save(entries, folder / "cache.pt")


def run(arguments: Sequence[str]) -> tuple[int, str, str]:
    """A command in this process: its status, stdout and stderr. Raises `Hang` and whatever the program does not catch."""

    def give_up(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s: {arguments}")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
    except SystemExit as exit_:
        return int(exit_.code or 0), out.getvalue(), err.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    raise Wrong("the program returned")


def names_below(folder: Path) -> set[str]:
    return {f"{root}/{name}" for root, folders, files in os.walk(folder) for name in (*folders, *files)}


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors beside each other in a folder, as the ecosystem's own libraries read them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in folder.glob("*.bin"):
        tensors |= {name: tensor.clone() for name, tensor in torch.load(path, weights_only=True).items()}
    return tensors


def loose_json(model: Path) -> dict[str, Any]:
    """The config, nothing where there is none."""
    return dict(read_json(model / "config.json")) if (model / "config.json").is_file() else {}


def check_sealed(output: Path) -> None:
    """Raises `Wrong` unless the receipt lists exactly these files with their digests."""
    listed = {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in read_json(output / RECEIPT)["files"]}
    present = {
        path.relative_to(output).as_posix(): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in output.rglob("*")
        if path.is_file() and path.name != RECEIPT
    }
    if listed != present:
        raise Wrong("the receipt does not list what is there")


def close(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to a few roundings to float32, relative to the largest entry."""
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    return actual.shape == wanted.shape and bool(((actual - wanted).abs() <= 2e-5 * size + 1e-30).all())


class AdapterDeltas:
    """A LoRA adapter on disk, by its definition in float64."""

    def __init__(self, folder: Path) -> None:
        self.tensors = {
            name.removeprefix("base_model.model."): tensor.double() for name, tensor in load_folder(folder).items()
        }
        self.config = read_json(folder / LORA_FILES[1])
        self.modules = {name.partition(".lora_")[0] for name in self.tensors}

    def delta(self, module: str) -> torch.Tensor:
        A, B = (self.tensors.get(f"{module}.lora_{side}.weight") for side in "AB")
        if A is None or B is None:
            raise Meaningless(f"half a pair at {module}")
        return oracle.rank_and_scaling(self.config, module)[1] * B @ A


def check_decomposition(model: Path, output: Path) -> list[str]:
    """Residual and initial adapter give the weights back."""
    base, residual = load_folder(model), load_folder(output)
    initial = AdapterDeltas(output / "corda_init")
    if base.keys() != residual.keys():
        return [f"other names: {sorted(base.keys() ^ residual.keys())}"]
    wrong = []
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module not in initial.modules:
            wrong += [] if torch.equal(oracle.bits(weight), oracle.bits(residual[name])) else [name]
            continue
        delta = initial.delta(module)  # which damage may have made far larger than the weight
        size = max(float(tensor.abs().max()) for tensor in (weight, delta))
        if not bool(((residual[name].double() + delta - weight.double()).abs() <= 1e-6 * size).all()):
            wrong.append(name)
    return wrong


@contextlib.contextmanager
def bounded_memory(nbytes: int) -> Iterator[None]:
    """This process may take so much more address space inside, and no more."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
