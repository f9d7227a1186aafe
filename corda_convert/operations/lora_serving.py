"""What a server would say of a converted LoRA before it is written, so that `to-lora --for` mends it at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corda_convert.adapters.lora import read_scaling
from corda_convert.adapters.replacements import SAVED_EMBEDDINGS
from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.adapter_facts import AdapterFacts
from corda_convert.operations.lora_modules import LoraModule, LoraSource
from corda_convert.operations.server_rules import Server
from corda_convert.operations.servers import check, fixes, flags


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the result has to be beside exact.

    Attributes:
        uniform: one rank for all modules.
        plain_scaling: a scaling of 1 for all, in lora_B.
        list_targets: `target_modules` as a list of paths.
        most_rank: the largest rank.
    """

    uniform: bool = False
    plain_scaling: bool = False
    list_targets: bool = False
    most_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """How a server takes the result: what was done for it, the command, and what depends on the model."""

    server: Server
    mended: tuple[str, ...]
    command: tuple[str, ...]
    depends: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "server": self.server,
            "mended": list(self.mended),
            "command": list(self.command),
            "depends": list(self.depends),
        }


def mend(
    server: Server, wishes: Wishes, facts_for: Callable[[Wishes], AdapterFacts], *, base: str = "BASE"
) -> tuple[Wishes, Served]:
    """What the server wants of the result beside `wishes`, and how it then takes it. `facts_for` tells what they lead to.

    `base` is how the command names the model. Raises `UnsupportedInput` with everything that no conversion mends.
    """
    mended: list[str] = []
    facts = facts_for(wishes)
    for takes_uniform in (False, True):  # one scaling may do where one rank is not needed
        findings = check(facts, server)
        wanted = fixes(findings)
        again = replace(
            wishes,
            uniform=wishes.uniform or (takes_uniform and (wanted.uniform or wanted.plain_scaling)),
            plain_scaling=wishes.plain_scaling or wanted.plain_scaling or wanted.uniform,
            list_targets=wishes.list_targets or wanted.list_targets,
            most_rank=wishes.most_rank or wanted.most_rank,
        )
        if again != wishes:
            mended += [finding.what for finding in findings if finding.fix is not None and finding.is_obstacle]
            wishes, facts = again, facts_for(again)
    findings = check(facts, server)
    left = [finding for finding in findings if finding.is_obstacle]
    if left:
        raise UnsupportedInput(
            f"{server} does not take the result as it is: {'; '.join(finding.what for finding in left)}.",
            why=" ".join(dict.fromkeys(finding.why for finding in left)),
            next_step="Merge the adapter into the base instead, or convert without --for.",
        )
    depends = tuple(f"{finding.what}: {finding.why}" for finding in findings)
    return wishes, Served(server, tuple(dict.fromkeys(mended)), flags(facts, server, base=base), depends)


def facts_of_result(source: LoraSource, ranks: Mapping[str, int], config: Mapping[str, Any]) -> AdapterFacts:
    """The facts of the LoRA that a source becomes with these stored ranks, by module, and this config."""
    scaling = read_scaling(dict(config))
    names = [carried.name.removeprefix(PEFT_PREFIX) for carried in source.carried]
    tokens = [name for name in names if name.endswith("trainable_tokens_delta")]
    lora_biases = [name for name in names if name.endswith(".lora_B.bias")]
    biases = [name for name in names if name.endswith(".bias") and name not in lora_biases]
    told = {*tokens, *lora_biases, *biases}
    return AdapterFacts(
        kind="lora",
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        use_rslora=scaling.use_rslora,
        ranks=dict(ranks),
        scalings={module.key: scaling.scaling_of(module.pattern_name) for module in source.modules},
        target_modules=config.get("target_modules"),
        embeddings=tuple(module.key for module in source.modules if module.is_embedding or _is_head(module.key)),
        experts=tuple(module.pattern_name for module in source.modules if module.is_parameter),
        unusual=tuple(module.key for module in source.modules if _is_unusual(module)),
        lora_biases=tuple(name.removesuffix(".lora_B.bias") for name in lora_biases),
        tokens=tuple(name.partition(".token_adapter")[0] for name in tokens),
        biases=tuple(biases),
        saved=tuple(name for name in names if name not in told),
    )


def _is_unusual(module: LoraModule) -> bool:
    """Whether it is a convolution, or a part of a MultiheadAttention."""
    return bool(module.kernel) or (module.pattern_name != module.key and not module.is_parameter)


def _is_head(key: str) -> bool:
    return key.rpartition(".")[2] in SAVED_EMBEDDINGS


def listed_targets(source: LoraSource) -> Sequence[str]:
    """The modules' whole paths."""
    return sorted({module.pattern_name for module in source.modules if not module.is_parameter})
