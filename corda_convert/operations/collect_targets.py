"""Whose inputs `collect` sums, and in which part of the model they run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corda_convert.errors import raise_problems
from corda_convert.operations.collect_options import CollectOptions
from corda_convert.operations.targets import Selection, choose_targets
from corda_convert.streaming.architecture import Architecture
from corda_convert.streaming.blocks import Blocks


@dataclass(frozen=True, slots=True)
class Wanted:
    """Modules by their path, and stacks of experts by their parameter.

    Attributes:
        widths: each Linear layer, and how many inputs it has.
        stacks: the parameters, and the modules that own them.
        left_out: Linear layers that were not named and cannot be decomposed.
    """

    widths: dict[str, int]
    stacks: dict[str, Any]
    left_out: tuple[str, ...] = ()

    def within(self, prefix: str) -> Wanted:
        """Those of one block."""
        return Wanted(
            {name: width for name, width in self.widths.items() if name.startswith(f"{prefix}.")},
            {name: module for name, module in self.stacks.items() if name.startswith(f"{prefix}.")},
        )

    def without(self, names: Iterable[str]) -> Wanted:
        known = set(names)
        return Wanted({name: width for name, width in self.widths.items() if name not in known}, {})

    def outside(self, blocks: Blocks) -> Wanted:
        """Those that are in no block."""
        inside = tuple(f"{blocks.name(index)}." for index in range(len(blocks.modules)))
        return Wanted({name: width for name, width in self.widths.items() if not name.startswith(inside)}, {})

    def __bool__(self) -> bool:
        return bool(self.widths or self.stacks)


def wanted_inputs(architecture: Architecture, options: CollectOptions) -> Wanted:
    """What `decompose` would take with these targets. Raises all problems together."""
    chosen = choose_targets(architecture.names, Selection(options.targets, options.excluded), for_peft=False)
    raise_problems(chosen.problems)
    modules = dict(architecture.model.named_modules())
    return Wanted(
        {target.module_name: target.d_in for target in chosen.targets},
        {name: modules[name.rpartition(".")[0]] for name in chosen.stacks},
        chosen.left_out,
    )
