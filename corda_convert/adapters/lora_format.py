"""PEFT's LoRA files → the changes that they make: factors, DoRA's norms, biases, trainable tokens.

Everything is driven by the keys in the file. What this version does not fold is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from corda_convert.adapters.bias import LoraBias
from corda_convert.adapters.dora import DoraFactors
from corda_convert.adapters.experts import parameter_factors, parameter_modules, parameter_paths, plain_path
from corda_convert.adapters.factors import Adapter, ParameterChange
from corda_convert.adapters.lora import LoraFactors, LoraScaling, initialization, read_scaling
from corda_convert.adapters.lora_options import TRAINING_ONLY, unsupported
from corda_convert.adapters.replacements import same_place, split_replacements
from corda_convert.adapters.source import CONFIG_FILE, AdapterSource
from corda_convert.adapters.tokens import is_token_key, token_rows
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some

_PARTS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_KEY = re.compile(rf"^(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})$")

_OUT_PROJ = ".base_layer.out_proj"
"""What PEFT puts between a MultiheadAttention and its output projection, which it adapts together with it."""


@dataclass(slots=True)
class _Module:
    """The tensors of one module, by their part: `A`, `B`, `bias`, `magnitude`."""

    parts: dict[str, TensorRef] = field(default_factory=dict)
    is_embedding: bool = False


class LoraFormat:
    """`peft_type: LORA`."""

    peft_types = ("LORA",)

    def parse(self, source: AdapterSource) -> Adapter:
        problems = list(unsupported(source))
        scaling = read_scaling(source.config)
        found, rest = _gather(source, problems)
        changes: list[ParameterChange] = []
        wrappers = parameter_modules(source, found)
        found = {name if name in wrappers else plain_path(name, wrappers): module for name, module in found.items()}
        for name, module in found.items():
            try:
                if name in wrappers:
                    _check_parts(source, name, module)
                    continue
                changes += _changes(source, name, module, scaling, found)
            except CordaConvertError as problem:
                problems.append(problem)
        complete = {name: module.parts for name, module in found.items() if {"A", "B"} <= set(module.parts)}
        if all(name in complete for name in wrappers):
            of_parameters, wrong = parameter_factors(source, wrappers, complete, scaling)
            changes += of_parameters
            problems += wrong
        tokens, wrong = token_rows(source)
        problems += wrong
        if source.config.get("trainable_token_indices") and not tokens and not wrong:
            problems.append(_no_rows(source))
        problems += [_both(source, each.module_name) for each in tokens if each.module_name in found]
        problems += _pattern_problems(scaling, _pattern_names(found, wrappers))
        bases = _bases(found, [each.module_name for each in tokens], rest)
        replacements, leftovers = split_replacements(source, rest)
        problems += leftovers
        raise_problems(problems)
        return Adapter(source, "lora", initialization(source.config), (*changes, *tokens), replacements, bases)


def _gather(
    source: AdapterSource, problems: list[CordaConvertError]
) -> tuple[dict[str, _Module], dict[str, TensorRef]]:
    """The tensors of each adapted module, and those that are no part of one. Notes two for one place."""
    found: dict[str, _Module] = {}
    rest: dict[str, TensorRef] = {}
    for key, ref in source.tensors.items():
        match = _KEY.match(key)
        if match is None:
            if not is_token_key(key) and not key.endswith(TRAINING_ONLY):
                rest[key] = ref
            continue
        module, part = found.setdefault(match["module"], _Module()), _PARTS[match["part"]]
        if part in module.parts:
            problems.append(same_place(source, module.parts[part], ref))
        module.parts[part] = ref
        module.is_embedding = module.is_embedding or "embedding" in match["part"]
    return found, rest


def _bases(found: Iterable[str], tokens: Iterable[str], rest: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Takes from `rest` the weights that the adapter brings along for adapted modules."""
    places = {name: f"{name}.base_layer.weight" for name in found}
    places |= {name: f"{name}.token_adapter.base_layer.weight" for name in tokens}
    return {name: rest.pop(key) for name, key in places.items() if key in rest}


def _changes(
    source: AdapterSource, name: str, module: _Module, scaling: LoraScaling, found: Mapping[str, _Module]
) -> list[ParameterChange]:
    """What the adapter does to one module. Raises one of our errors if its tensors do not go together."""
    _check_parts(source, name, module)
    pattern_name = _pattern_name(name, found)
    rank, scale = scaling.rank_of(pattern_name), scaling.scaling_of(pattern_name)
    factors = _factors(source, name, module, rank, scale)
    if f"{name}{_OUT_PROJ}" in found:
        if "bias" in module.parts:
            raise UnsupportedInput(
                f"{source.name}: {name} is a MultiheadAttention with lora_bias, which PEFT trains without using it."
            )
        return [replace(factors, parameter="in_proj_weight", kinds=("attention",), rounds_delta=True)]
    if pattern_name != name:
        # PEFT adds it twice, in the forward pass as in the merge: that is the function which was trained
        projection = replace(factors, module_name=f"{pattern_name}.out_proj", kinds=("linear",))
        return [replace(projection, rounds_delta=True), projection]
    if "magnitude" in module.parts:
        magnitude = module.parts["magnitude"]
        return [DoraFactors(factors, magnitude.reshaped((magnitude.spec.elements,)))]
    if "bias" in module.parts:
        return [factors, LoraBias(name, module.parts["bias"], scale)]
    return [factors]


def _pattern_name(name: str, found: Mapping[str, _Module]) -> str:
    """The module whose name the patterns are for: the output projection of a MultiheadAttention goes with that."""
    outer = name.removesuffix(_OUT_PROJ)
    return outer if outer in found else name


def _pattern_names(found: Mapping[str, _Module], wrappers: Mapping[str, tuple[str, ...]]) -> set[str]:
    """What the patterns may be for: the adapted modules, and parameters that the config targets."""
    return {_pattern_name(name, found) for name in found if name not in wrappers} | parameter_paths(wrappers)


def _check_parts(source: AdapterSource, name: str, module: _Module) -> None:
    """Raises one of our errors unless these are all the tensors that the config speaks of, in dtypes to compute with."""
    wanted = {"A", "B"}
    if source.config.get("use_dora"):
        wanted.add("magnitude")
    if source.config.get("lora_bias"):
        wanted.add("bias")
    labels = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
    missing, extra = sorted(wanted - set(module.parts)), sorted(set(module.parts) - wanted)
    if missing:
        present = " and ".join(labels[part] for part in sorted(module.parts))
        raise AdapterMismatch(
            f"{source.name}: {name} has {present} but no {' and no '.join(labels[part] for part in missing)}.",
            why="The adapter file is incomplete.",
        )
    if extra:
        option = "use_dora" if "magnitude" in extra else "lora_bias"
        raise AdapterMismatch(
            f"{source.name}: {name} has {labels[extra[0]]}, but {CONFIG_FILE} does not say {option}.",
            why="The config and the weights are not of one adapter.",
        )
    for part, ref in module.parts.items():
        if ref.spec.dtype not in COMPUTABLE_DTYPES:
            raise UnsupportedInput(f"{source.name}: {labels[part]} of {name} has the dtype {ref.spec.dtype}.")


def _factors(source: AdapterSource, name: str, module: _Module, rank: int, scaling: float) -> LoraFactors:
    A, B = module.parts["A"], module.parts["B"]
    kernel = A.shape[2:]
    if _is_grouped(A, B, rank):
        raise UnsupportedInput(
            f"{source.name}: {name} is a convolution in groups (lora_A {A.shape}, lora_B {B.shape}): every group of outputs "
            "sees all the inputs through lora_A, which no weight in groups can do.",
            why="PEFT cannot merge it either.",
        )
    fits = len(A.shape) >= 2 and A.shape[0] == rank and B.shape[1:] == (rank, *(1 for _ in kernel))
    if not fits:
        raise AdapterMismatch(
            f"{source.name}: {name} has lora_A {A.shape} and lora_B {B.shape}; {CONFIG_FILE} says rank {rank}, so "
            f"({rank}, d_in) and (d_out, {rank}) were expected.",
            why="The config and the weights are not of one adapter.",
        )
    matrix_A, matrix_B = A.reshaped((rank, A.spec.elements // rank)), B.reshaped((B.shape[0], rank))
    rounds_delta = module.is_embedding or str(source.config.get("init_lora_weights")).lower() == "mica"
    factors = LoraFactors(name, matrix_A, matrix_B, scaling, kernel=kernel, rounds_delta=rounds_delta)
    if module.is_embedding:
        return replace(factors, is_embedding=True, kinds=("embedding",))
    return replace(factors, kinds=("conv",)) if kernel else factors


def _is_grouped(first: TensorRef, second: TensorRef, rank: int) -> bool:
    """Whether A and B are of a convolution in groups: B's own groups each take a part of the rank."""
    if len(first.shape) < 3 or len(first.shape) != len(second.shape) or first.shape[0] != rank:
        return False
    return 0 < second.shape[1] < rank and rank % second.shape[1] == 0


def _no_rows(source: AdapterSource) -> CordaConvertError:
    return AdapterMismatch(
        f"{source.name}: {CONFIG_FILE} has trainable_token_indices, but there are no trainable tokens.",
        why="The adapter file is incomplete.",
    )


def _both(source: AdapterSource, name: str) -> CordaConvertError:
    return UnsupportedInput(f"{source.name} has both LoRA factors and trainable tokens for {name}, as PEFT never has.")


def _pattern_problems(scaling: LoraScaling, modules: Iterable[str]) -> list[CordaConvertError]:
    unmatched = scaling.unmatched(modules)
    if not unmatched:
        return []
    return [
        AdapterMismatch(
            f"{CONFIG_FILE}: no adapted module matches the rank or alpha pattern {some(unmatched)}.",
            why="The patterns and the weights are not of one adapter, or a name was mistyped in training.",
            next_step="Correct or remove the pattern in the config.",
        )
    ]
