"""Initial factors of a weight that another module shares without having factors: a tied head, adapted alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from corda_convert.adapters.dora import DoraFactors
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.names import NameMap
from corda_convert.errors import some
from corda_convert.operations.belonging import Part
from corda_convert.operations.edits import Fitted


def half_tied_warnings(
    part: Part, changes: Sequence[Fitted], names: NameMap, *, brought: Collection[str] = ()
) -> Iterable[str]:
    """A warning for each such module of an adapter with initial factors, but for those whose weight it brings along."""
    if part.initial is None:
        return
    changed = [each for each in changes if isinstance(each.change, LoraFactors | DoraFactors)]
    adapted = {each.target.name for each in changed}
    for each in changed:
        others = [name.rpartition(".")[0] for name in names.shared.get(each.target.name, ()) if name not in adapted]
        if others and each.change.module_name not in brought:
            yield (
                f"{each.change.module_name} shares its weight with {some(others)}. Where the training took the initial factors "
                f"out of the shared tensor, as PEFT's PiSSA and OLoRA do, {some(others)} went without them, too, which on the "
                "base they do not. Then merge the adapter into the residual instead."
            )
