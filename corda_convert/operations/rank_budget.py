"""`decompose --rank-budget`: a first pass over the layers finds what their components weigh, and so the rank of each.

Order and budget are those of EVA (arXiv:2410.07170): components of all layers compete by
the share of their layer's `‖W T‖_F²`. But the budget is in parameters and so is the price, since layers differ in size.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert import engine
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec, read_tensor
from corda_convert.errors import UnsupportedInput, raise_problems, some
from corda_convert.linalg.allocation import Components, allocate, uniform_rank
from corda_convert.operations import process_memory
from corda_convert.operations.decompose_options import DecomposeOptions
from corda_convert.operations.decomposition import DecomposeTransform, Mode
from corda_convert.operations.options import RunOptions
from corda_convert.operations.targets import Target
from corda_convert.plan.division import Share, divide
from corda_convert.plan.model import OutputFileSpec, Plan, Produced
from corda_convert.plan.packing import pack

MOST_OF_UNIFORM = 2
"""Without `--rank-max`: no rank above so many times that which the budget pays everywhere, EVA's default of rho."""

CRITERIA: Mapping[Mode, str] = {
    "ipm": "the largest share of ‖W T‖² for each parameter first",
    "kpm": "the smallest share of ‖W T‖² for each parameter first",
}

SPECTRA_FILE = "spectra.safetensors"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is known of the ranks before any weight is read.

    Attributes:
        parameters: the budget, in parameters of all lora_A and lora_B together.
        uniform: the rank that it pays everywhere.
        least: no module gets less.
        most: no module gets more, nor more than its weight has.
    """

    parameters: int
    uniform: int
    least: int
    most: int

    def most_of(self, target: Target) -> int:
        return min(self.most, target.d_out, target.d_in)

    def uniform_of(self, target: Target) -> int:
        return min(max(self.uniform, 1), target.d_out, target.d_in)

    def receipt(self, mode: Mode) -> dict[str, Any]:
        return {
            "criterion": CRITERIA[mode],
            "parameters": self.parameters,
            "uniform_rank": self.uniform,
            "rank_min": self.least,
            "rank_max": self.most,
        }


def rank_bounds(targets: Sequence[Target], options: DecomposeOptions) -> Bounds:
    """The bounds of the ranks. Raises `UnsupportedInput` where no choice of ranks meets them and the budget."""
    parameters = options.rank_budget or 0
    uniform = uniform_rank([(target.d_out, target.d_in) for target in targets], parameters)
    least = options.rank_min
    most = options.rank_max if options.rank_max is not None else max(MOST_OF_UNIFORM * max(uniform, 1), least)
    bounds = Bounds(parameters, uniform, least, most)
    small = [target.module_name for target in targets if least > min(target.d_out, target.d_in)]
    lowest = sum(least * component_cost(target) for target in targets) or min(map(component_cost, targets))
    highest = sum(bounds.most_of(target) * component_cost(target) for target in targets)
    problems = []
    if small:
        problems.append(
            UnsupportedInput(
                f"--rank-min {least} is above what {some(small)} have.",
                next_step="Choose a smaller one, or leave modules out with --exclude.",
            )
        )
    if parameters < lowest:
        what = f"rank {least} in each of {len(targets)} modules" if least else "one component"
        problems.append(
            UnsupportedInput(
                f"A budget of {parameters:,} parameters does not pay {what}: {lowest:,}.",
                next_step="Give more with --rank-budget"
                + (", allow less with --rank-min" if least else "")
                + ", or choose fewer modules with --target.",
            )
        )
    if parameters > highest:
        problems.append(
            UnsupportedInput(
                f"A budget of {parameters:,} parameters is more than rank {most} in each of {len(targets)} modules takes, "
                f"or all that they have: {highest:,}.",
                next_step="Give less with --rank-budget"
                + (", or allow more with --rank-max." if options.rank_max is not None else "."),
            )
        )
    raise_problems(problems)
    return bounds


def component_cost(target: Target) -> int:
    """The parameters of a module's adapter for each rank."""
    return target.d_out + target.d_in


@dataclass(frozen=True, slots=True)
class FirstPass:
    """A pass over the layers that finds their singular values and writes nothing but those, to a temporary folder."""

    plan: Plan
    run: RunOptions
    memory_bytes: int

    def shares(self, mode: Mode) -> dict[str, list[float]]:
        """By module: the share of each component in `‖W T‖_F²`, in the order in which they are taken.

        Components that are zero in float64 have a share of exactly 0. Several processes divide the layers, and each has
        all shares in the end.
        """
        ranks, plan = self.run.ranks, self.plan
        jobs = divide(plan, range(len(plan.jobs)), ranks.place.size)[ranks.place.rank].jobs
        with (
            ranks.leaving(),
            tempfile.TemporaryDirectory(prefix="corda-convert-") as folder,
            _progress(len(jobs), self.run) as advance,
        ):
            share = Share(jobs, frozenset())
            record = engine.run(plan, Path(folder), self.run.torch_device(), advance, share=share)
            os.truncate(
                Path(folder) / SPECTRA_FILE, plan.write_bytes
            )  # it ends early where others have the last layers
            file = SafetensorsFile(Path(folder) / SPECTRA_FILE)
            spectra = {name: read_tensor(TensorRef(file, file.specs[name])).tolist() for name in record.facts}
            file.close()
        own = {name: _shares(values, record.facts[name], mode) for name, values in spectra.items()}
        return {name: shares for several in ranks.exchange(own) for name, shares in several.items()}


def plan_first_pass(transforms: Sequence[DecomposeTransform], run: RunOptions) -> FirstPass:
    """Plans it for transforms that yield `singular_values` only, called as their modules.

    Raises `MemoryBudgetExceeded`.
    """
    tensors = [
        Produced(TensorSpec(transform.module_name, "F64", (transform.rank,)), transform) for transform in transforms
    ]
    held = process_memory.resident_bytes()
    plan = pack(
        [OutputFileSpec(SPECTRA_FILE, tuple(tensors), {})], max_memory_bytes=run.max_memory_bytes, held_bytes=held
    )
    return FirstPass(plan, run, held + plan.memory_bytes)


def _shares(values: Sequence[float], facts: Mapping[str, Any], mode: Mode) -> list[float]:
    """Shares of singular values, which fall, in the order in which they are taken, by what the decomposition tells."""
    singular = facts["singular_values"]
    zero = singular["largest"] * sys.float_info.epsilon
    squares = [value**2 if value > zero else 0.0 for value in values]
    factor = facts["taken_share"] / sum(squares) if any(squares) else 0.0
    shares = [square * factor for square in squares]
    return shares if mode == "ipm" else shares[::-1]


@dataclass(frozen=True, slots=True)
class Choice:
    """The rank of every module that gets one, what the receipt says of it, and what the user should know."""

    ranks: Mapping[str, int]
    facts: dict[str, Any]
    warnings: tuple[str, ...]


def choose_ranks(
    targets: Sequence[Target], shares: Mapping[str, Sequence[float]], bounds: Bounds, mode: Mode
) -> Choice:
    """Spends the budget on the components of these shares."""
    layers = [Components(shares[target.module_name], component_cost(target), least=bounds.least) for target in targets]
    counts = allocate(layers, bounds.parameters, end="top" if mode == "ipm" else "bottom")
    chosen = {target.module_name: count for target, count in zip(targets, counts, strict=True)}
    taken = [share for layer, count in zip(layers, counts, strict=True) for share in layer.shares[:count]]
    evenly = [
        share
        for target, layer in zip(targets, layers, strict=True)
        for share in layer.shares[: bounds.uniform_of(target) if bounds.uniform else 0]
    ]
    facts = {
        **bounds.receipt(mode),
        "spent": sum(layer.cost * count for layer, count in zip(layers, counts, strict=True)),
        "mean_share": sum(taken) / len(targets),
        "mean_share_uniform": sum(evenly) / len(targets),
        "ranks": chosen,
    }
    without = [module for module, count in chosen.items() if count == 0]
    warnings = []
    if without:
        warnings.append(f"{len(without)} modules get no rank out of the budget and stay as they are: {some(without)}.")
    if zeros := taken.count(0.0):
        warnings.append(
            f"{zeros} of the {len(taken)} components that the budget takes are zero; such ones do not learn. "
            "Damp the covariances (--damp), or collect more tokens."
        )
    return Choice({module: count for module, count in chosen.items() if count}, facts, tuple(warnings))


@contextlib.contextmanager
def _progress(layers: int, run: RunOptions) -> Iterator[Callable[[str, int], None]]:
    """A bar by layers on stderr with the module's name, only on a terminal. Where another process fails, it stops this one."""
    from tqdm import tqdm

    with tqdm(
        total=layers,
        desc="ranks",
        unit="layer",
        disable=None if run.progress and run.ranks.place.rank == 0 else True,
        file=sys.stderr,
        leave=False,
    ) as bar:

        def advance(name: str, _nbytes: int) -> None:
            run.ranks.check()
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield advance
