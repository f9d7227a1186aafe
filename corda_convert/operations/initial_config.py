"""The `adapter_config.json` of an initial adapter: ranks, scalings and modules such that PEFT finds exactly ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from corda_convert.adapters.lora import pattern_key
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.structure import ModelStructure
from corda_convert.errors import CordaConvertError, UnsupportedInput
from corda_convert.operations.decomposition import Mode
from corda_convert.operations.targets import Target

_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank and `lora_alpha` of each module, by PEFT's own rules for patterns: the first one that matches counts.

    Attributes:
        rank: where no pattern matches.
        alpha: where no pattern matches; None for the module's rank.
        use_rslora: whether alpha is divided by the root of the rank.
        rank_pattern: regular expressions for the end of a path → rank.
        alpha_pattern: the same for alpha.
        chosen: ranks by module path instead of all that, with alpha in proportion to them (with rslora the same for all).
    """

    rank: int
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    chosen: Mapping[str, int] = field(default_factory=dict)

    def rank_of(self, module_name: str) -> int:
        if module_name in self.chosen:
            return self.chosen[module_name]
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module_name), self.rank)

    def alpha_of(self, module_name: str) -> float:
        own: float = self.rank_of(module_name) if self.alpha is None else self.alpha
        if self.alpha is not None and module_name in self.chosen and not self.use_rslora:
            own *= self.chosen[module_name] / self.rank
        return plain(self.alpha_pattern.get(pattern_key(self.alpha_pattern, module_name), own))

    def scaling_of(self, module_name: str) -> float:
        rank, alpha = self.rank_of(module_name), self.alpha_of(module_name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def number_problems(self) -> list[CordaConvertError]:
        """Ranks and alphas that make no sense, and patterns that are no regular expressions."""
        ranks = {"The rank": self.rank, **{f"The rank of {key}": rank for key, rank in self.rank_pattern.items()}}
        alphas = {f"Alpha of {key}": alpha for key, alpha in self.alpha_pattern.items()}
        alphas |= {} if self.alpha is None else {"Alpha": self.alpha}
        texts = [f"{what} is {rank}, at least 1 was expected." for what, rank in ranks.items() if rank < 1]
        texts += [
            f"{what} is {alpha}, a positive number was expected."
            for what, alpha in alphas.items()
            if not 0 < alpha < math.inf
        ]
        return [*map(UnsupportedInput, texts), *self._broken_patterns()]

    def _broken_patterns(self) -> Iterable[CordaConvertError]:
        for option, pattern in self._patterns():
            try:
                re.compile(pattern)
            except re.error as error:
                yield UnsupportedInput(f"{option} {pattern!r} is no name and no regular expression: {error}.")

    def unused_patterns(self, modules: Sequence[str]) -> list[CordaConvertError]:
        """A problem for each pattern that decides for none of the modules."""
        ends = sorted({module.rpartition(".")[2] for module in modules})
        used = {
            (option, pattern_key(patterns, module))
            for option, patterns in (("--rank-pattern", self.rank_pattern), ("--alpha-pattern", self.alpha_pattern))
            for module in modules
        }
        return [
            UnsupportedInput(
                f"{option} {pattern!r} is for none of the {len(modules)} modules.",
                why="They match an earlier pattern, which counts."
                if any(pattern_key([pattern], module) == pattern for module in modules)
                else None,
                next_step=f"The modules end in: {', '.join(ends)}.",
            )
            for option, pattern in self._patterns()
            if (option, pattern) not in used
        ]

    def _patterns(self) -> Iterable[tuple[str, str]]:
        yield from (("--rank-pattern", pattern) for pattern in self.rank_pattern)
        yield from (("--alpha-pattern", pattern) for pattern in self.alpha_pattern)


def initial_config(
    checkpoint: Checkpoint,
    structure: ModelStructure,
    targets: Sequence[Target],
    ranks: Ranks,
    *,
    mode: Mode,
    residual_name: str,
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """The config, with which PEFT loads the factors as they are, beside the residual of that name.

    `init_lora_weights` is true, so that PEFT computes nothing. `corda_config` has no effect then; it stays through
    training and says that the adapter belongs beside a residual, as does the residual's name. `parameters` are stacks of
    experts' matrices, which lie in the adapter as in PEFT from the version on that the config then names.
    """
    modules = [target.module_name for target in targets]
    adapted = [*modules, *parameters]
    alpha = plain(ranks.rank if ranks.alpha is None else ranks.alpha)
    rank_as_alpha = ranks.rank_pattern if ranks.alpha is None else {}
    return {
        "alpha_pattern": _pattern(
            {**rank_as_alpha, **ranks.alpha_pattern}, alpha, {module: ranks.alpha_of(module) for module in adapted}
        ),
        "base_model_name_or_path": residual_name,
        "bias": "none",
        "corda_config": {"corda_method": mode},
        "fan_in_fan_out": any(target.layout == "in_out" for target in targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": ranks.rank,
        "rank_pattern": _pattern(ranks.rank_pattern, ranks.rank, {module: ranks.rank_of(module) for module in adapted}),
        "target_modules": target_modules(structure, modules),
        "task_type": _task_type(checkpoint),
        "use_dora": False,
        "use_rslora": ranks.use_rslora,
        **_parameters(structure, parameters),
    }


STACKS_SINCE = "0.19.1"
"""From this version on PEFT takes a stack of square matrices as we do."""


def _parameters(structure: ModelStructure, parameters: Sequence[str]) -> dict[str, Any]:
    """What selects exactly these parameters in PEFT: the ends of their paths, else the whole of them."""
    if not parameters:
        return {}
    ends = {".".join(name.split(".")[-2:]) for name in parameters}
    selected = {name for name in structure.parameters if any(name.endswith(f".{end}") for end in ends)}
    found = ends if selected == set(parameters) else set(parameters)
    return {"peft_version": STACKS_SINCE, "target_parameters": sorted(found)}


def _pattern(given: Mapping[str, _Value], default: _Value, wanted: Mapping[str, _Value]) -> dict[str, _Value]:
    """Patterns that give every module what is wanted, in sorted order: PEFT sorts them when it saves the adapter again.

    The ones given where they do, else the paths of the modules that differ from the default.
    """
    patterns = {key: plain(given[key]) for key in sorted(given)}
    keys = {module: pattern_key(patterns, module) for module in wanted}
    resolved = {module: patterns.get(key, default) for module, key in keys.items()}
    if resolved == wanted and patterns.keys() <= set(keys.values()):
        return patterns
    differing = {module: value for module, value in sorted(wanted.items()) if value != default}
    if any(end in differing for module in wanted for end in _ends(module)):
        return {f"^{re.escape(module)}": value for module, value in differing.items()}
    return differing


def target_modules(structure: ModelStructure, modules: Sequence[str]) -> list[str] | str:
    """What selects exactly these modules in PEFT: the last parts of their paths, else whole paths, else an expression."""
    chosen = set(modules)
    everything = _module_paths(structure)
    for names in ({module.rpartition(".")[2] for module in chosen}, chosen):
        if {module for module in everything if module in names or any(end in names for end in _ends(module))} == chosen:
            return sorted(names)
    return "|".join(re.escape(module) for module in sorted(chosen))


def _ends(module: str) -> Iterable[str]:
    """What a path ends in, from the second of its parts on."""
    parts = module.split(".")
    return (".".join(parts[first:]) for first in range(1, len(parts)))


def _module_paths(structure: ModelStructure) -> set[str]:
    """Every module that owns a parameter or holds one that does."""
    paths = set(structure.layers)
    for name in structure.parameters:
        parts = name.split(".")
        paths |= {".".join(parts[:count]) for count in range(1, len(parts))}
    return paths


def _task_type(checkpoint: Checkpoint) -> str | None:
    """None for classifiers: with their task types PEFT trains the head and demands it in every adapter it loads."""
    architecture = str(((checkpoint.config or {}).get("architectures") or [""])[0])
    return "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None


def plain(value: _Value) -> _Value:
    """A whole number as an integer, as people write it into configs."""
    return int(value) if float(value).is_integer() else value
