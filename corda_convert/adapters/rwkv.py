"""RWKV-PEFT's adapters: one `.pth` file without a config, for an RWKV base of the same tensor names.

Facts, from github.com/JL-er/RWKV-PEFT (`rwkvt/lightning_train/trainer.py`, `rwkvt/peft/`, `merge/`):

- The trainer saves the trained tensors under the base's own names. Full ones (by default all with `time` or `ln` in their
  names) replace the base's. Linear layers in `att` and `ffn` alone are adapted; their weights are (d_out, d_in).
- `M.disha`, before February 2025 `M.bone`: (r, d_out) is a balance block, as in PEFT. (d_in / r, r, r) is a bat block, and
  not PEFT's: `W_ij += W_ij @ D_j + D_j`, a block for each r inputs, where PEFT has one for each r outputs.
- `M.lora_A` (r, d_in), `M.lora_B` (d_out, r), of LoRA and PiSSA alike. LoRA scales by alpha / r, and alpha is an argument
  of the merge script. PiSSA does not scale; `init_pissa.pth` holds the factors that its training began with, as
  `M.init_lora_A` and `M.init_lora_B`, now under `model.`, and the base lacks their product during training.
- The merge scripts compute in the tensors' own dtype, mostly bfloat16; here it is float32, rounded once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from corda_convert.adapters.factors import Adapter, Initialization, ParameterChange
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.miss import BlockFactors
from corda_convert.adapters.replacements import same_place
from corda_convert.adapters.source import AdapterSource
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import (
    AdapterMismatch,
    CordaConvertError,
    MalformedFile,
    UnsupportedInput,
    raise_problems,
    some,
)

SUFFIXES = (".pth", ".pt", ".bin")

_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>(?:init_)?lora_[AB]|disha|bone)$")
_WRAPPER = "model."


@dataclass(frozen=True, slots=True)
class RwkvTraining:
    """What a file does not tell of its LoRA factors.

    Attributes:
        alpha: lora_alpha of a LoRA training.
        has_initial: whether the initial factors are at hand, so that it is PiSSA, which does not scale.
    """

    alpha: float | None = None
    has_initial: bool = False


@dataclass(frozen=True, slots=True)
class _Contents:
    """The tensors of a file: by module and part, and the others by name."""

    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    rest: dict[str, TensorRef] = field(default_factory=dict)

    @property
    def parts(self) -> set[str]:
        return {part for parts in self.modules.values() for part in parts}


def read_rwkv(path: Path, training: RwkvTraining) -> Adapter:
    """A trained adapter of RWKV-PEFT. Raises one of our errors, all problems together."""
    source, contents = _read(path)
    if contents.parts & {"init_lora_A", "init_lora_B"}:
        raise AdapterMismatch(
            f"{source.name} holds the factors that a PiSSA training began with, not those that it ended with.",
            next_step="Give it as --init, and the trained file (rwkv-N.pth) as --adapter.",
        )
    if {"lora_A", "lora_B"} & contents.parts:
        scaled = _check_scaling(source, training)
        return _lora(scaled, contents, "lora_", training)
    return _blocks(source, contents)


def read_rwkv_initial(path: Path) -> Adapter:
    """The initial factors of a PiSSA training (`init_pissa.pth`). Raises one of our errors, all problems together."""
    source, contents = _read(path)
    if not contents.parts <= {"init_lora_A", "init_lora_B"} or contents.rest:
        raise AdapterMismatch(
            f"{source.name} does not hold initial factors alone (init_lora_A and init_lora_B of each module).",
            next_step="Give the init_pissa.pth that RWKV-PEFT wrote when the training began.",
        )
    return _lora(source, contents, "init_lora_", RwkvTraining(has_initial=True))


def _read(path: Path) -> tuple[AdapterSource, _Contents]:
    if path.suffix not in SUFFIXES:
        raise UnsupportedInput(
            f"{path} is no adapter: a folder of PEFT, or a file of RWKV-PEFT that ends in {', '.join(SUFFIXES)} is.",
            next_step="Give the folder that PEFT's save_pretrained wrote.",
        )
    file = PickleFile(path)
    is_wrapped = bool(file.specs) and all(name.startswith(_WRAPPER) for name in file.specs)
    names = {name.removeprefix(_WRAPPER) if is_wrapped else name: name for name in file.specs}
    tensors = {name: TensorRef(file, file.specs[stored]) for name, stored in names.items()}
    contents = _Contents()
    for name, ref in tensors.items():
        match = _KEY.match(name)
        if match is None:
            contents.rest[name] = ref
        else:
            contents.modules.setdefault(match["module"], {})[match["part"]] = ref
    if not contents.modules:
        raise MalformedFile(
            f"{path} adapts no module: it has no tensor NAME.disha, NAME.bone or NAME.lora_A.",
            why="A file on its own is read as an adapter of RWKV-PEFT. What its state tuning saves is no adapter."
            if any("state" in name for name in tensors)
            else "A file on its own is read as an adapter of RWKV-PEFT.",
            next_step="For an adapter of PEFT, give its folder.",
        )
    return AdapterSource(path, {}, file, tensors), contents


def _check_scaling(source: AdapterSource, training: RwkvTraining) -> AdapterSource:
    """Refuses LoRA factors of unknown scaling. Returns the source with what is known as its config."""
    if training.has_initial:
        if training.alpha is not None:
            raise UnsupportedInput(
                "--alpha is for RWKV-PEFT's LoRA, initial factors are for its PiSSA, which does not scale.",
                next_step="Leave out one of the two.",
            )
        return source
    if training.alpha is None:
        raise UnsupportedInput(
            f"{source.name} does not tell how its LoRA factors are scaled.",
            why="RWKV-PEFT saves neither lora_alpha nor whether it was LoRA or PiSSA.",
            next_step="For LoRA say --alpha with the lora_alpha of the training; for PiSSA give its init_pissa.pth as --init.",
        )
    if training.alpha == 0 or not math.isfinite(training.alpha):
        raise UnsupportedInput(f"--alpha is {training.alpha:g}; a finite number other than 0 was expected.")
    return AdapterSource(source.folder, {"lora_alpha": training.alpha}, source.file, source.tensors)


def _lora(source: AdapterSource, contents: _Contents, prefix: str, training: RwkvTraining) -> Adapter:
    problems: list[CordaConvertError] = []
    factors: list[ParameterChange] = []
    for module, parts in contents.modules.items():
        problem = _factors_problem(source, module, parts, prefix)
        if problem is not None:
            problems.append(problem)
            continue
        A, B = parts[f"{prefix}A"], parts[f"{prefix}B"]
        scaling = 1.0 if training.alpha is None else training.alpha / A.shape[0]
        factors.append(LoraFactors(module, A, B, scaling, kinds=("linear",)))
    bases, replacements = _split(contents)
    if training.has_initial and bases:
        problems.append(
            UnsupportedInput(
                f"{source.name} brings along the weight of {some(bases)}, which PiSSA adapts.",
                why="It was saved without the part that the initial factors took out of it.",
            )
        )
    raise_problems(problems)
    initialization: Initialization = "residual" if training.has_initial else "plain"
    return Adapter(source, "lora", initialization, tuple(factors), replacements, bases)


def _factors_problem(
    source: AdapterSource, module: str, parts: Mapping[str, TensorRef], prefix: str
) -> CordaConvertError | None:
    expected = {f"{prefix}A", f"{prefix}B"}
    if set(parts) != expected:
        return AdapterMismatch(
            f"{source.name}: {module} has {' and '.join(sorted(parts))}; {' and '.join(sorted(expected))} were expected.",
            why="The file is incomplete, or of two trainings.",
        )
    A, B = parts[f"{prefix}A"], parts[f"{prefix}B"]
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        return AdapterMismatch(
            f"{source.name}: {module} has {prefix}A {A.shape} and {prefix}B {B.shape}; (r, d_in) and (d_out, r) were expected."
        )
    return _dtype_problem(source, module, (A, B))


def _blocks(source: AdapterSource, contents: _Contents) -> Adapter:
    problems: list[CordaConvertError] = []
    blocks: list[ParameterChange] = []
    for module, parts in contents.modules.items():
        (part, ref), *others = parts.items()
        problem = same_place(source, ref, others[0][1]) if others else _block_problem(source, module, ref)
        if problem is None:
            blocks.append(BlockFactors(module, ref, "balance" if len(ref.shape) == 2 else "input-bat", part))
        else:
            problems.append(problem)
    raise_problems(problems)
    bases, replacements = _split(contents)
    return Adapter(source, sorted(contents.parts)[-1], "plain", tuple(blocks), replacements, bases)


def _block_problem(source: AdapterSource, module: str, ref: TensorRef) -> CordaConvertError | None:
    is_bat = len(ref.shape) == 3 and ref.shape[1] == ref.shape[2]
    if (len(ref.shape) != 2 and not is_bat) or 0 in ref.shape:
        return AdapterMismatch(
            f"{source.name}: the block of {module} is {ref.shape}; (r, d_out) or (d_in / r, r, r) was expected."
        )
    return _dtype_problem(source, module, (ref,))


def _dtype_problem(source: AdapterSource, module: str, refs: tuple[TensorRef, ...]) -> CordaConvertError | None:
    odd = [ref for ref in refs if ref.spec.dtype not in COMPUTABLE_DTYPES]
    if not odd:
        return None
    return UnsupportedInput(f"{source.name}: {odd[0].name} of {module} has the dtype {odd[0].spec.dtype}.")


def _split(contents: _Contents) -> tuple[dict[str, TensorRef], dict[str, TensorRef]]:
    """The weights of adapted modules, by module, and the other full tensors, by name."""
    bases = {
        module: contents.rest[f"{module}.weight"] for module in contents.modules if f"{module}.weight" in contents.rest
    }
    taken = {f"{module}.weight" for module in bases}
    return bases, {name: ref for name, ref in contents.rest.items() if name not in taken}
