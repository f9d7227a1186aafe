"""What the pictures that compare methods ask of their options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from corda_convert.checkpoint.covariances import Covariances
from corda_convert.errors import CordaConvertError, InputNotFound, UnsupportedInput
from corda_convert.operations.contexts import Method


def method_problems(
    methods: Sequence[Method], covariances: Covariances | None, damp: float | Literal["peft"], asvd_alpha: float
) -> list[CordaConvertError]:
    """Covariances that are missing or that no method takes, and numbers out of their range."""
    problems: list[CordaConvertError] = []
    weighted = [method for method in methods if method != "svd"]
    if weighted and covariances is None:
        subject = f"Method {weighted[0]} needs" if len(weighted) == 1 else f"Methods {', '.join(weighted)} need"
        problems.append(
            InputNotFound(
                f"{subject} covariances.",
                next_step="Give them with --cov FILE, or take the plain SVD of the weights with --method svd.",
            )
        )
    if covariances is not None and not weighted:
        problems.append(UnsupportedInput("Method svd takes no covariances.", next_step="Leave out --cov."))
    if damp != "peft" and not 0 <= damp < math.inf:
        problems.append(UnsupportedInput(f"--damp is {damp}; it is a number from 0 on, or peft."))
    if not 0 <= asvd_alpha < math.inf:
        problems.append(UnsupportedInput(f"--asvd-alpha is {asvd_alpha}; it is a number from 0 on."))
    return problems
