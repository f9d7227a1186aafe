"""The transform behind `decompose`: one weight and its covariance → residual weight and initial LoRA factors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from corda_convert.adapters.factors import Layout, dimensions
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import CovarianceMismatch, NotFinite
from corda_convert.plan.model import Facts, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.linalg.covariance import Damping
    from corda_convert.linalg.subspace import Subspace

Mode = Literal["ipm", "kpm"]
Method = Literal["corda", "svd"]


@dataclass(frozen=True, slots=True)
class DecomposeTransform:
    """`W_res = W − s·B·A` with `s·B·A = U Uᵀ W`, U the left singular vectors of `W (C + λI)` (or of W, method svd).

    Attributes:
        weight: the stored weight.
        covariance: (d_in, d_in), or None for method svd.
        damp: a factor of the mean diagonal, or `peft` for the reference's doubling rule.
        names: output names of residual, lora_A and lora_B.
    """

    module_name: str
    weight: TensorRef
    covariance: TensorRef | None
    layout: Layout
    mode: Mode
    rank: int
    scaling: float
    damp: float | Literal["peft"]
    names: tuple[str, str, str]

    action = "decomposed"
    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        operands = {"weight": self.weight}
        return operands if self.covariance is None else {**operands, "covariance": self.covariance}

    def workspace_bytes(self, rows: int) -> int:
        """W and W·C in float64; then C, or the Gram matrix with its eigenvectors and the solver's own workspace."""
        d_out, d_in = dimensions(self.weight.spec, self.layout)
        side = min(d_out, d_in)
        tall = d_out * d_in if d_out > d_in and self.mode == "kpm" else 0
        context = 0 if self.covariance is None else (3 if self.damp == "peft" else 1) * d_in * d_in
        elements = 2 * d_out * d_in + tall + max(context, 5 * side * side) + 4 * self.rank * (d_out + d_in)
        return 8 * elements

    def begin(self, device: torch.device) -> Session:
        return _DecomposeSession(self, device)


SMALL_SIDE = 512
"""Below this an eigenproblem runs on one thread: threads would only wait for each other, on a busy machine for long."""


@dataclass(slots=True)
class _DecomposeSession:
    transform: DecomposeTransform
    device: torch.device
    result: Facts = field(default_factory=dict)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none: all the work is one step."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        from corda_convert.linalg.threads import one_thread

        begun = time.perf_counter()
        is_small = min(self.transform.weight.shape) < SMALL_SIDE
        with one_thread() if is_small else contextlib.nullcontext():
            try:
                self._decompose(inputs, outputs)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise NotFinite(
                    f"The singular vectors of {self.transform.module_name} cannot be computed in float64.",
                    why="The values of its weight or its covariance are far too large.",
                ) from None
        self.result["seconds"] = time.perf_counter() - begun

    def _decompose(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        from corda_convert.linalg import subspace as algebra

        transform = self.transform
        self._check_finite(inputs)
        weight = inputs["weight"].to(self.device).double()
        if transform.layout == "in_out":
            weight = weight.T
        matrix, damping = self._weighted(weight, inputs)
        end: algebra.End = "top" if transform.mode == "ipm" else "bottom"
        found = algebra.left_subspace(matrix, rank=transform.rank, end=end)
        del matrix
        factors = algebra.balanced_factors(weight, found, scaling=transform.scaling)
        residual = algebra.residual(weight, factors, scaling=transform.scaling)
        stored = residual.T if transform.layout == "in_out" else residual
        for name, tensor in zip(transform.names, (stored, factors.lora_A, factors.lora_B), strict=True):
            outputs[name].copy_(tensor)
        self._check_output(outputs[transform.names[0]])
        self.result = self._facts(weight, residual, found, damping, factors.zero_components)

    def _check_finite(self, inputs: Mapping[str, Tensor]) -> None:
        import torch

        for name, ref in self.transform.whole.items():
            if not bool(torch.isfinite(inputs[name]).all()):
                why = (
                    "The calibration ran over a float16 range, or the file is damaged."
                    if name == "covariance"
                    else None
                )
                raise NotFinite(f"{ref.name} in {ref.file.path} holds NaN or Inf.", why=why)

    def _check_output(self, residual: Tensor) -> None:
        import torch

        if not bool(torch.isfinite(residual).all()):
            raise NotFinite(
                f"The residual of {self.transform.weight.name} is outside the range of {residual.dtype}.",
                next_step="Choose --dtype bfloat16 or float32.",
            )

    def _weighted(self, weight: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Damping | None]:
        from corda_convert.linalg import covariance as algebra

        transform = self.transform
        if transform.covariance is None:
            return weight, None
        covariance = inputs["covariance"].to(self.device)
        if float(covariance.diagonal().double().mean()) <= 0.0:
            raise CovarianceMismatch(
                f"The covariance of {transform.module_name} is zero on average: no sample reached this layer.",
                next_step="Collect covariances on data that uses this layer, or leave it out with --target.",
            )
        if transform.damp == "peft":
            damping = algebra.reference_damping(covariance)
        else:
            damping = algebra.relative_damping(covariance, transform.damp)
        if damping is None:
            raise CovarianceMismatch(
                f"The covariance of {transform.module_name} stays singular in float32 for every damping of the "
                f"reference's rule up to 0.01·2^{algebra.MAX_DOUBLINGS}.",
                next_step="Use --damp 0.01, which needs no inverse.",
            )
        return algebra.weighted(weight, covariance, damping), damping

    def _facts(
        self, weight: Tensor, residual: Tensor, found: Subspace, damping: Damping | None, zero_components: int
    ) -> Facts:
        import torch

        total = float(found.spectrum.square().sum())
        taken = float(found.singular_values.square().sum())
        return {
            "module": self.transform.module_name,
            "rank": self.transform.rank,
            "scaling": self.transform.scaling,
            "solver": "gram-eigh-float64",
            "certificate": {"residual": found.residual, "orthonormality": found.orthonormality},
            "damping": None if damping is None else {"factor": damping.factor, "amount": damping.amount},
            "singular_values": {
                "largest": float(found.spectrum[0]),
                "smallest": float(found.spectrum[-1]),
                "taken_largest": float(found.singular_values[0]),
                "taken_smallest": float(found.singular_values[-1]),
            },
            "taken_share": taken / total if total > 0 else 0.0,
            "zero_components": zero_components,
            "weight_norm": float(torch.linalg.vector_norm(weight)),
            "delta_norm": float(torch.linalg.vector_norm(weight - residual)),
        }

    def facts(self) -> Facts:
        return self.result
