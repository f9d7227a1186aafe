"""LoRA on parameters (`target_parameters`): stacks of experts' matrices, routers, and whatever else is no layer of its own.

PEFT wraps a module once for each parameter of it that is targeted, the first registered innermost. The keys tell the
wrapper, so that the parameter's name follows from the config and the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from corda_convert.adapters.expert_columns import HeldColumns
from corda_convert.adapters.factors import Block, Layout, RowFold, UsualChange
from corda_convert.adapters.lora import LoraFactors, LoraScaling, initialization
from corda_convert.adapters.patterns import check_pattern
from corda_convert.adapters.source import CONFIG_FILE, AdapterSource
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WRAPPER = ".base_layer"


@dataclass(frozen=True, slots=True)
class ParameterFactors(UsualChange):
    """LoRA factors of one parameter: `ΔW = s·B·A`, for each expert e with its own rows of A and columns of B.

    A is (r·E, d_in), expert after expert; B is (d_out, r·E), column e of each of its r groups for expert e. A parameter
    that is one matrix has E = 1.

    Attributes:
        module: path of the module that owns the parameter.
        depth: how many wrappers stand around this one.
        wrappers: how many the module has, one for each of its targeted parameters.
        candidates: what the config may mean: names in the module.
        scalings: rank and scaling by the parameter's name.
        peft_version: of the config.
        columns: what reads `lora_B` expert by expert.
        parameter: its name in the module, where the model has told it.
        experts: E, where the model has told it.
        initial: the factors that its training began with, where these are to be taken out.
    """

    module: str
    depth: int
    wrappers: int
    candidates: tuple[str, ...]
    lora_A: TensorRef
    lora_B: TensorRef
    scalings: LoraScaling
    peft_version: object
    columns: HeldColumns
    parameter: str | None = None
    experts: int = 1
    initial: ParameterFactors | None = None

    @property
    def module_name(self) -> str:
        """The parameter's path; the module's where it is not known yet which one is meant."""
        return self.module if self._own_name is None else f"{self.module}.{self._own_name}"

    @property
    def _own_name(self) -> str | None:
        return self.candidates[0] if len(self.candidates) == 1 else self.parameter

    @property
    def rounds_delta(self) -> bool:
        return True

    @property
    def rank(self) -> int:
        """That of each expert."""
        return self.scalings.rank_of(self.module_name)

    @property
    def scaling(self) -> float:
        return self.scalings.scaling_of(self.module_name)

    @property
    def key(self) -> str:
        """The path of its wrapper, which is its own among all adapters of these parameters."""
        return self.module + self.depth * _WRAPPER

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        if not known:
            return tuple(f"{self.module}.{name}" for name in self.candidates)
        order = self._registered(known)
        return (f"{self.module}.{order[-1 - self.depth]}",) if len(order) == self.wrappers else ()

    def _registered(self, known: Sequence[str]) -> tuple[str, ...]:
        """The targeted parameters of the module in the order of their registration; none if that is not known.

        A module that has another name in the model is taken to be like those that have as many of these parameters.
        """
        modules: dict[str, list[str]] = {}
        for name in known:
            module, _, parameter = name.rpartition(".")
            if parameter in self.candidates:
                modules.setdefault(module, []).append(parameter)
        if self.module in modules:
            return tuple(modules[self.module])
        alike = {tuple(names) for names in modules.values() if len(names) == self.wrappers}
        return alike.pop() if len(alike) == 1 else ()

    def for_target(self, target: Target) -> ParameterFactors:
        if target.kind is None:
            return self  # which parameter it is, only the model's class can tell
        experts = target.shape[0] if target.is_stack else 1
        own = replace(self, parameter=target.name.rpartition(".")[2], experts=experts)
        return own if self.initial is None else own._with_initial(self.initial.for_target(target))

    def _with_initial(self, initial: ParameterFactors) -> ParameterFactors:
        scalings = self.scaling, initial.scaling
        if not math.isclose(*scalings, rel_tol=1e-9):
            raise AdapterMismatch(
                f"{self.module_name}: the adapter scales by {scalings[0]:g}, the initial adapter by {scalings[1]:g}; they must "
                "agree.",
                next_step="Compare r, lora_alpha, use_rslora and the patterns of both configs.",
            )
        return replace(self, initial=initial)

    def fit(self, target: Target) -> Layout:
        if target.kind is None:
            raise UnsupportedInput(
                f"{self.module_name}: without the model's class it is not known how LoRA on a parameter is meant.",
                next_step="Put the model's config.json beside its weights, of an architecture that transformers knows.",
            )
        shape = target.shape[1:] if target.is_stack else target.shape
        if len(shape) != 2:
            raise UnsupportedInput(
                f"{target.name} is {target.shape}: LoRA on parameters is for matrices and stacks of them."
            )
        self._check_rank()
        factors = (self.lora_B.shape[0], self.lora_A.shape[1])
        fitting: list[Layout] = ["out_in"] if factors == shape else []
        fitting += ["in_out"] if factors == shape[::-1] and self.experts > 1 else []
        if not fitting:
            raise AdapterMismatch(
                f"Adapter does not fit {target.name}: it is {target.shape}, "
                f"lora_B gives {factors[0]} rows and lora_A {factors[1]} columns."
            )
        if len(fitting) == 2:
            return self._orientation(target)
        return fitting[0]

    def _check_rank(self) -> None:
        width = self.rank * self.experts
        if self.lora_A.shape[0] != width or self.lora_B.shape[1] != width:
            of_experts = f" for each of {self.experts} experts" if self.experts > 1 else ""
            raise AdapterMismatch(
                f"{self.module_name} has lora_A {self.lora_A.shape} and lora_B {self.lora_B.shape}; {CONFIG_FILE} says rank "
                f"{self.rank}{of_experts}, so ({width}, d_in) and (d_out, {width}) were expected.",
                why="The config and the weights are not of one adapter, or the model has another number of experts.",
            )

    def _orientation(self, target: Target) -> Layout:
        """How PEFT takes a stack of square matrices, which changed twice."""
        version = _release(self.peft_version)
        if version is None or (0, 18, 1) < version < (0, 19, 0):
            raise UnsupportedInput(
                f"{target.name} is a stack of square matrices: whether LoRA on it is transposed depends on the version of "
                f"PEFT, and {CONFIG_FILE} says {self.peft_version!r}.",
                next_step="Write the released version of PEFT that the training used as peft_version into the config.",
            )
        if version <= (0, 18, 1):
            return "in_out"
        return "out_in" if target.is_transposed == (version < (0, 19, 1)) else "in_out"

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        return self._of_expert(block).operands(block)

    def streams(self, block: Block) -> frozenset[str]:
        return self._of_expert(block).streams(block)

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> RowFold:
        return self._of_expert(block).begin(block, whole, dtype, scale)

    def _of_expert(self, block: Block) -> LoraFactors:
        expert, rank = block.expert or 0, self.rank
        A = self.lora_A.rows(expert * rank, (expert + 1) * rank)
        B = self.columns.of(self.lora_B, self.experts).rows(expert, expert + 1)
        own = LoraFactors(self.module_name, A, B.reshaped((self.lora_B.shape[0], rank)), self.scaling)
        if self.initial is None:
            return own
        first = self.initial._of_expert(block)
        return replace(own, initial_lora_A=first.lora_A, initial_lora_B=first.lora_B)

    def describe(self) -> dict[str, object]:
        if self._own_name is None:
            return {"kind": "lora_parameter"}
        return {"kind": "lora_parameter", "rank": self.rank, "scaling": self.scaling}


def _release(version: object) -> tuple[int, ...] | None:
    """Major, minor and patch of a release; (0, 17, 0) for a config without one, which PEFT writes since 0.18.

    None for what is no release: a version in development may be from before or after a change.
    """
    if version is None:
        return (0, 17, 0)
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    numbers = tuple(int(part) for part in match.groups()) if match is not None else ()
    is_release = re.fullmatch(r"[\d.]+(\.post\d+)?", str(version)) is not None
    return numbers if numbers and (is_release or not (0, 18, 1) < numbers <= (0, 19, 1)) else None


# From the file's keys to factors.


def parameter_modules(source: AdapterSource, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which of the modules that have factors, as the keys name them, are wrappers of parameters.

    Each with the names that its parameter may have. Raises `AdapterMismatch` for a config that cannot be read, or that
    speaks of parameters where there are none.
    """
    targets = source.config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise AdapterMismatch(f"{CONFIG_FILE}: target_parameters is {targets!r}, a list of names was expected.")
    found: dict[str, tuple[str, ...]] = {}
    for key in modules if targets else ():
        module = _unwrapped(key)
        names = sorted({target.rpartition(".")[2] for target in targets if _is_targeted(module, target)})
        if names and not (module == key and _is_target_module(source.config, module)):
            found[key] = tuple(names)
    if targets and not found:
        raise AdapterMismatch(
            f"{source.name}: {CONFIG_FILE} has target_parameters, but there are no factors of a parameter.",
            why="The adapter file is incomplete, or no parameter of the model had such a name.",
            next_step="In the latter case, remove target_parameters from the config.",
        )
    return found


def parameter_paths(wrappers: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Every path that a parameter of those wrappers may have."""
    return {f"{_unwrapped(key)}.{name}" for key, names in wrappers.items() for name in names}


def plain_path(key: str, wrappers: Mapping[str, tuple[str, ...]]) -> str:
    """The path of an adapted module that lies below a module with wrappers, without them."""
    outer, wrapper, rest = key.partition(f"{_WRAPPER}.")
    if not wrapper or outer not in wrappers:
        return key
    while rest.startswith(f"{_WRAPPER[1:]}."):
        rest = rest.partition(".")[2]
    return f"{outer}.{rest}"


def _unwrapped(key: str) -> str:
    while key.endswith(_WRAPPER):
        key = key.removesuffix(_WRAPPER)
    return key


def _is_targeted(module: str, target: str) -> bool:
    path, _, name = target.rpartition(".")
    return not path or f"{module}.{name}" == target or f"{module}.{name}".endswith(f".{target}")


def _is_target_module(config: Mapping[str, Any], module: str) -> bool:
    """Whether `target_modules` means the module, so that it is no module of targeted parameters."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        check_pattern(targets, most=8)
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            return False
    return any(module == target or module.endswith(f".{target}") for target in targets)


def parameter_factors(
    source: AdapterSource,
    wrappers: Mapping[str, tuple[str, ...]],
    parts: Mapping[str, Mapping[str, TensorRef]],
    scalings: LoraScaling,
) -> tuple[list[ParameterFactors], list[CordaConvertError]]:
    """The factors of the parameters that `parameter_modules` found, and what is wrong. `parts` has A and B by key."""
    problems: list[CordaConvertError] = []
    if wrappers and initialization(source.config) == "residual":
        problems.append(
            UnsupportedInput(
                f"{source.name} has LoRA on parameters ({_unwrapped(next(iter(wrappers)))}) with init_lora_weights="
                f"{source.config.get('init_lora_weights')!r}: what is left of a parameter beside its initial factors is not "
                "known.",
                why="PEFT initializes layers in this way, and no stacks of experts.",
            )
        )
    version = source.config.get("peft_version")
    columns = HeldColumns()
    factors: list[ParameterFactors] = []
    for module in dict.fromkeys(_unwrapped(key) for key in wrappers):
        keys = sorted((key for key in wrappers if _unwrapped(key) == module), key=len)
        if keys != [module + depth * _WRAPPER for depth in range(len(keys))]:
            problems.append(_gap(source, module, keys))
            continue
        for depth, key in enumerate(keys):
            A, B = parts[key]["A"], parts[key]["B"]
            if len(A.shape) != 2 or len(B.shape) != 2 or 0 in (*A.shape, *B.shape):
                what = f"{source.name}: {key} has lora_A {A.shape} and lora_B {B.shape}; matrices were expected."
                problems.append(AdapterMismatch(what))
                continue
            of_module = (module, depth, len(keys), wrappers[key])
            factors.append(ParameterFactors(*of_module, A, B, scalings, version, columns))
    return factors, problems


def _gap(source: AdapterSource, module: str, keys: Sequence[str]) -> CordaConvertError:
    missing = next(key for depth in range(len(keys)) if (key := module + depth * _WRAPPER) not in keys)
    return AdapterMismatch(
        f"{source.name}: {keys[-1]} has LoRA factors, but {missing} has none.", why="The adapter file is incomplete."
    )
