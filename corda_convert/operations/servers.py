"""What stands against serving an adapter as it is, what mends it, and how the server is started.

The rules are in `server_rules`. In short: `check(facts_of(adapter), "vllm")` finds, `fixes` of that says what `to-lora` has
to do, and `flags` how the server then takes the adapter.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corda_convert.checkpoint.hub_id import parse_hub_id
from corda_convert.operations.adapter_facts import AdapterFacts
from corda_convert.operations.server_rules import RULES, VLLM_RANKS, Fix, Server, Severity

FIXES: dict[Fix, str] = {
    "initial": "to-lora --init INIT makes it an ordinary LoRA for the base, of twice the rank",
    "blocks": "to-lora --base BASE makes it an ordinary LoRA",
    "rank": "to-lora --rank {rank} makes the best LoRA of that rank, and tells its error",
    "uniform": "to-lora --uniform gives all modules one rank and one scaling",
    "scaling": "to-lora --for {server} takes the scaling into lora_B",
    "targets": "to-lora --for {server} lists the modules",
}
"""Each fix in words."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says of one adapter: `what` offends, `why`, and what to do: `fix` for programs, `how` in words."""

    server: Server
    rule: str
    severity: Severity
    what: str
    why: str
    fix: Fix | None
    how: str

    @property
    def is_obstacle(self) -> bool:
        """Whether the adapter is not served as it is; false for what depends on the model or the version."""
        return self.severity != "depends"


@dataclass(frozen=True, slots=True)
class Fixes:
    """What `to-lora` has to do so that the server takes the result.

    Attributes:
        subtract_initial: take the initial factors out.
        convert_blocks: turn Bone or MiSS blocks into LoRA factors.
        uniform: one rank, and one scaling, for all modules; no patterns.
        plain_scaling: a scaling of alpha / r, without rsLoRA.
        list_targets: `target_modules` as a list of names.
        most_rank: the largest rank that the server takes, where the adapter's is larger.
        left: what none of this mends: merging is the way.
    """

    subtract_initial: bool = False
    convert_blocks: bool = False
    uniform: bool = False
    plain_scaling: bool = False
    list_targets: bool = False
    most_rank: int | None = None
    left: tuple[Finding, ...] = ()


def check(facts: AdapterFacts, server: Server) -> tuple[Finding, ...]:
    """What stands against serving the adapter as it is, and what depends on the model."""
    findings = []
    for rule in RULES:
        what = rule.offends(facts) if rule.server == server else ""
        if what:
            how = "merge it into the base" if rule.fix is None else FIXES[rule.fix]
            if rule.severity == "depends" and rule.fix is None:
                how = "try it, or merge it into the base"
            words = how.format(server=server, rank=VLLM_RANKS[-1])
            findings.append(Finding(server, rule.name, rule.severity, what, rule.why, rule.fix, words))
    return tuple(findings)


def fixes(findings: Sequence[Finding]) -> Fixes:
    """What `to-lora` has to do about the findings, and which of them it cannot mend."""
    wanted = {finding.fix for finding in findings}
    return Fixes(
        subtract_initial="initial" in wanted,
        convert_blocks="blocks" in wanted,
        uniform="uniform" in wanted,
        plain_scaling="scaling" in wanted or "uniform" in wanted,
        list_targets="targets" in wanted,
        most_rank=VLLM_RANKS[-1] if "rank" in wanted else None,
        left=tuple(finding for finding in findings if finding.is_obstacle and finding.fix is None),
    )


def base_in_commands(name: str | None) -> str:
    """A base model as commands name it: a folder that is here, or what may be a model of the Hub; else `BASE`."""
    try:
        return name if name and (Path(name).is_dir() or parse_hub_id(name) is not None) else "BASE"
    except (OSError, ValueError):
        return "BASE"


def flags(facts: AdapterFacts, server: Server, path: Path | str = "ADAPTER", base: str = "BASE") -> tuple[str, ...]:
    """The commands, or flags, with which the server takes the adapter, once nothing stands against it."""
    rank, model = facts.served_rank, shlex.quote(base)
    if server == "vllm":
        largest = next((allowed for allowed in VLLM_RANKS[2:] if allowed >= rank), VLLM_RANKS[-1])
        given = f" --max-lora-rank {largest}" if largest > VLLM_RANKS[2] else ""
        return (f"vllm serve {model} --enable-lora{given} --lora-modules NAME={path}",)
    if server == "sglang":
        return (f"sglang serve --model-path {model} --enable-lora --lora-paths NAME={path}",)
    if server == "llama.cpp":
        folder = model if Path(base).is_dir() else "BASE"
        return (
            f"python convert_lora_to_gguf.py --base {folder} --outfile adapter.gguf {path}",
            "llama-server --model BASE.gguf --lora adapter.gguf",
        )
    return (f'PeftModel.from_pretrained(base, "{path}")',)
