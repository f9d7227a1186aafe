"""The transform behind `decompose` for stacks of experts' matrices: each expert by itself, their factors in one adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorRef, torch_dtype
from corda_convert.operations.decomposition import DecomposeTransform
from corda_convert.plan.model import Facts, Part, Session, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RESIDUAL, LORA_A, LORA_B = "residual", "lora_A", "lora_B"
"""The outputs of one expert's decomposition."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a tensor on disk that hold rows of one expert's matrix.

    Attributes:
        tensor: the tensor's name.
        place: which of the checkpoint's tensors it is, by number.
        ref: what is read.
        part: where it is in the tensor, seen as a matrix.
        first: first row of the expert's matrix that is held.
        count: how many.
        transposed: they are columns on disk.
    """

    tensor: str
    place: int
    ref: TensorRef
    part: Part
    first: int
    count: int
    transposed: bool

    @property
    def operand(self) -> str:
        return f"{self.tensor}@{self.part.begin}"


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter (E, d1, d2) of a module, and where its factors go.

    Attributes:
        name: the parameter's path.
        experts: E.
        rank: of each expert.
        lora_A: name and shape (r·E, inputs), expert after expert; None where factors are not kept.
        lora_B: name and shape (outputs, r·E), column e of each of its r groups for expert e.
        is_swapped: PEFT takes the matrices for the transposed ones, so that its A is our Bᵀ.
    """

    name: str
    experts: int
    rank: int
    lora_A: tuple[str, tuple[int, int]] | None
    lora_B: tuple[str, tuple[int, int]] | None
    is_swapped: bool


@dataclass(frozen=True, slots=True)
class Expert:
    """One matrix (d1, d2) of a stack: its rows on disk, and its decomposition, with outputs `RESIDUAL`, `LORA_A`, `LORA_B`."""

    stack: Stack
    number: int
    shape: tuple[int, int]
    rows: tuple[StoredRows, ...]
    decomposition: DecomposeTransform

    @property
    def dtype(self) -> str:
        return self.rows[0].ref.spec.dtype

    @property
    def makes_residual(self) -> bool:
        return self.decomposition.names.residual is not None

    @property
    def operands(self) -> dict[str, TensorRef]:
        read = {rows.operand: rows.ref for rows in self.rows}
        context = self.decomposition.whole.get("context")
        return read if context is None else {**read, self.context: context}

    @property
    def context(self) -> str:
        """The operand's name."""
        return f"context of {self.decomposition.module_name}"


@dataclass(frozen=True)
class ExpertsTransform:
    """The stacks of one module. Experts are taken one after the other, the factors are written after the last.

    Attributes:
        stacks: the parameters that are decomposed.
        groups: all their matrices in the order of the disk; those of a group lie among each other, and are read and written
            together.
    """

    stacks: tuple[Stack, ...]
    groups: tuple[tuple[Expert, ...], ...]

    row_quantum = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def action(self) -> str:
        return self.groups[0][0].decomposition.action

    @property
    def experts(self) -> tuple[Expert, ...]:
        return tuple(expert for group in self.groups for expert in group)

    @property
    def factors(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        return tuple(each for stack in self.stacks for each in (stack.lora_A, stack.lora_B) if each is not None)

    @property
    def steps(self) -> Sequence[Step]:
        steps = []
        for group in self.groups:
            operands = {name: ref for expert in group for name, ref in expert.operands.items()}
            written = [rows for expert in group for rows in expert.rows if expert.makes_residual]
            written.sort(key=lambda rows: rows.place)
            steps.append(Step(operands, {rows.tensor: rows.part for rows in written}))
        return [*steps, *(Step({}, {name: Part(0, shape[0], shape[0])}) for name, shape in self.factors)]

    @property
    def described(self) -> int:
        return len(described_outputs(self))

    def workspace_bytes(self, rows: int) -> int:
        """The factors of all experts, and the largest matrix as stored, as written, and while it is decomposed."""
        held = sum(4 * shape[0] * shape[1] for _, shape in self.factors)
        return held + max(
            expert.decomposition.workspace_bytes(0)
            + 16 * expert.shape[0] * expert.shape[1]
            + 4 * expert.stack.rank * sum(expert.shape)
            for expert in self.experts
        )

    def begin(self, device: torch.device) -> Session:
        return _ExpertsSession(self, device)


@dataclass(slots=True)
class _ExpertsSession:
    transform: ExpertsTransform
    device: torch.device
    factors: dict[str, Tensor] = field(default_factory=dict)
    found: dict[tuple[str, int], Facts] = field(default_factory=dict)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        import torch

        self.factors = {name: torch.empty(shape) for name, shape in self.transform.factors}

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        if first_row < len(self.transform.groups):
            for expert in self.transform.groups[first_row]:
                self._decompose(expert, inputs, outputs)
            return
        ((name, output),) = outputs.items()
        output.copy_(self.factors.pop(name))

    def _decompose(self, expert: Expert, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        transform = expert.decomposition
        operands = {"weight": torch.empty(expert.shape, dtype=torch_dtype(expert.dtype))}
        for rows in expert.rows:
            stored = inputs[rows.operand]
            operands["weight"][rows.first : rows.first + rows.count] = stored.T if rows.transposed else stored
        if expert.context in inputs:
            operands["context"] = inputs[expert.context]
        made: dict[str, Tensor] = {}
        if expert.makes_residual:
            made[RESIDUAL] = torch.empty(expert.shape, dtype=outputs[expert.rows[0].tensor].dtype)
        d_in, d_out = expert.shape if transform.layout == "in_out" else expert.shape[::-1]
        if transform.names.lora_A is not None:
            made[LORA_A], made[LORA_B] = torch.empty(transform.rank, d_in), torch.empty(d_out, transform.rank)
        session = transform.begin(self.device)
        session.prepare({})
        session.step(0, operands, made)
        self.found[expert.stack.name, expert.number] = session.facts()
        self._place(expert, made, outputs)

    def _place(self, expert: Expert, made: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Puts residual and factors where they belong."""
        for rows in expert.rows if RESIDUAL in made else ():
            part = made[RESIDUAL][rows.first : rows.first + rows.count]
            outputs[rows.tensor].copy_(part.T if rows.transposed else part)
        stack, number = expert.stack, expert.number
        if stack.lora_A is None or stack.lora_B is None:
            return
        A, B = made[LORA_A], made[LORA_B]
        if stack.is_swapped:
            A, B = B.T, A.T
        self.factors[stack.lora_A[0]][number * stack.rank : (number + 1) * stack.rank] = A
        self.factors[stack.lora_B[0]][:, number :: stack.experts] = B

    def facts(self) -> Facts:
        described = described_outputs(self.transform)
        outputs: dict[str, Facts] = {}
        for name, experts in described.items():
            each = [self.found[expert.stack.name, expert.number] for expert in experts]
            outputs[name] = {**each[0], "expert": experts[0].number} if len(each) == 1 else together(experts, each)
        firsts = {expert.stack.name: name for name, experts in reversed(described.items()) for expert in experts}
        for expert in self.transform.experts if self.transform.experts[0].makes_residual else ():
            for rows in expert.rows:
                outputs.setdefault(rows.tensor, {"with": expert.rows[0].tensor})
        for stack in self.transform.stacks:
            for factor in (stack.lora_A, stack.lora_B):
                if factor is not None:
                    outputs.setdefault(factor[0], {"with": firsts[stack.name]})
        return {"outputs": outputs}


def described_outputs(transform: ExpertsTransform) -> dict[str, list[Expert]]:
    """The outputs that have facts of their own, and the matrices that these are of.

    That is the first tensor of each matrix; without residuals the stack's lora_A.
    """
    described: dict[str, list[Expert]] = {}
    for expert in transform.experts:
        factor = expert.stack.lora_A
        name = expert.rows[0].tensor if expert.makes_residual or factor is None else factor[0]
        described.setdefault(name, []).append(expert)
    return described


def together(experts: Sequence[Expert], found: Sequence[Facts]) -> Facts:
    """What the receipt says of several matrices in one tensor: their norms together, of the rest the worst."""
    certificates = [facts["certificate"] for facts in found]
    values = [facts["singular_values"] for facts in found]
    norms: Facts = {
        name: sqrt(sum(facts[name] ** 2 for facts in found))
        for name in ("weight_norm", "delta_norm", "rounding_norm")
        if name in found[0]
    }
    if "reconstruction_error" in found[0]:
        norms["reconstruction_error"] = norms["rounding_norm"] / norms["weight_norm"] if norms["weight_norm"] else 0.0
    worst = min(found, key=_support)
    return {
        **worst,
        "module": experts[0].stack.name,
        "experts": len(experts),
        "solver": Counter(facts["solver"] for facts in found).most_common(1)[0][0],
        "fallback_from": sorted({name for facts in found for name in facts["fallback_from"]}),
        "steps": _most(facts["steps"] for facts in found),
        "certificate": {
            **{name: _most(each[name] for each in certificates) for name in certificates[0] if name != "holds"},
            "holds": all(each["holds"] for each in certificates),
        },
        "singular_values": {
            name: (min if name.endswith("smallest") else max)(known, default=None)
            for name in values[0]
            for known in [[each[name] for each in values if each[name] is not None]]
        },
        "taken_share": min(facts["taken_share"] for facts in found),
        "taken_share_is_estimate": any(facts["taken_share_is_estimate"] for facts in found),
        "zero_components": sum(facts["zero_components"] for facts in found),
        **norms,
        "seconds": sum(facts["seconds"] for facts in found),
    }


def _support(facts: Facts) -> tuple[int, int]:
    """Of how many directions, and from how many tokens, a covariance is; 0 where that is not known."""
    covariance = facts.get("covariance") or {}
    known = [count for count in (covariance.get("rank"), covariance.get("tokens")) if count is not None]
    return min(known, default=0), covariance.get("tokens") or 0


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
