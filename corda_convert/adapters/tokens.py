"""Trainable tokens: rows of an embedding, or of a head, that the adapter has anew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.adapters.factors import Adapter, Additive, Block, Layout, RowFold, UsualChange
from corda_convert.adapters.replacements import split_replacements
from corda_convert.adapters.source import CONFIG_FILE, AdapterSource
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TOKEN_ROWS = re.compile(r"^(?P<module>.+?)(?P<inner>\.token_adapter)?\.trainable_tokens_delta$")


@dataclass(frozen=True, slots=True)
class TokenRows(UsualChange):
    """Rows `indices` of a weight (vocabulary, dim), replaced by those of `rows` (n, dim), in that order."""

    module_name: str
    rows: TensorRef
    indices: tuple[int, ...]

    @property
    def is_embedding(self) -> bool:
        return True

    @property
    def is_linear(self) -> bool:
        return False

    @property
    def keeps_tie(self) -> bool:
        return True

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        return (f"{self.module_name}.weight",)

    def fit(self, target: Target) -> Layout:
        if target.kind not in ("embedding", "linear", None):
            raise AdapterMismatch(f"{self.module_name} is of type {target.kind}, which has no rows for tokens.")
        if len(target.shape) != 2 or target.shape[1] != self.rows.shape[1]:
            raise AdapterMismatch(
                f"Adapter does not fit {self.module_name}: the weight is {target.shape}, "
                f"the rows of its trainable tokens are {self.rows.shape}."
            )
        if any(place.piece.transposed for place in target.places):
            raise UnsupportedInput(
                f"{self.module_name}: {target.name} lies transposed on disk, where tokens are no rows."
            )
        beyond = [str(index) for index in self.indices if index >= target.shape[0]]
        if beyond:
            raise AdapterMismatch(
                f"Adapter does not fit {self.module_name}: it has {target.shape[0]} rows, and none for the trainable "
                f"tokens {some(beyond)}.",
                why="The vocabulary was resized before the training.",
            )
        return "out_in"

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        return {"tokens": self.rows}

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> RowFold:
        if scale != 1.0:
            raise UnsupportedInput(f"{self.module_name}: rows that are replaced cannot be taken {scale:g} times.")
        return _RowsFold(block.outputs[0], whole["tokens"], self.indices)

    def describe(self) -> dict[str, object]:
        return {"kind": "trainable_tokens", "tokens": len(self.indices)}


@dataclass(frozen=True, slots=True)
class _RowsFold(Additive):
    """Rows are tokens, the first of them number `begin` of the whole weight."""

    begin: int
    tokens: Tensor
    indices: tuple[int, ...]

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        from corda_convert.linalg.lora import square

        begin = self.begin + first
        changed = 0.0
        for place, index in enumerate(self.indices):
            if begin <= index < begin + rows.shape[0]:
                changed += square(self.tokens[place] - rows[index - begin])
                rows[index - begin] = self.tokens[place]
        return changed


def token_rows(source: AdapterSource) -> tuple[list[TokenRows], list[CordaConvertError]]:
    """The rows of trainable tokens in an adapter's file, each with its indices, and what is wrong with them."""
    found: list[TokenRows] = []
    problems: list[CordaConvertError] = []
    for key, ref in source.tensors.items():
        match = _TOKEN_ROWS.match(key)
        if match is None:
            continue
        try:
            found.append(TokenRows(match["module"], ref, _checked(source, match["module"], ref)))
        except CordaConvertError as problem:
            problems.append(problem)
    return found, problems


def is_token_key(key: str) -> bool:
    """Whether `token_rows` takes the tensor of that key."""
    return _TOKEN_ROWS.match(key) is not None


def _checked(source: AdapterSource, module: str, ref: TensorRef) -> tuple[int, ...]:
    """The indices of a module's trainable tokens. Raises one of our errors unless they go with the rows."""
    indices = _indices(source.config, module)
    if not isinstance(indices, list) or any(type(index) is not int or index < 0 for index in indices):
        raise AdapterMismatch(
            f"{source.name}: {module} has trainable tokens, but {CONFIG_FILE} gives no list of their indices."
        )
    if len(ref.shape) != 2 or ref.shape[0] != len(indices):
        raise AdapterMismatch(
            f"{source.name}: the trainable tokens of {module} are {ref.shape}, {CONFIG_FILE} gives {len(indices)} indices.",
            why="The config and the weights are not of one adapter.",
        )
    if len(set(indices)) != len(indices):
        raise AdapterMismatch(f"{source.name}: {CONFIG_FILE} gives a trainable token of {module} twice.")
    if ref.spec.dtype not in COMPUTABLE_DTYPES:
        raise UnsupportedInput(f"{source.name}: the trainable tokens of {module} have the dtype {ref.spec.dtype}.")
    return tuple(indices)


def _indices(config: dict[str, Any], module: str) -> object:
    """PEFT takes the first key that the module's path ends with; a list is for the input embedding."""
    given = config.get("trainable_token_indices")
    given = config.get("token_indices") if given is None else given
    if not isinstance(given, dict):
        return given
    return next((indices for name, indices in given.items() if module.endswith(name)), None)


class TokensFormat:
    """`peft_type: TRAINABLE_TOKENS`."""

    peft_types = ("TRAINABLE_TOKENS",)

    def parse(self, source: AdapterSource) -> Adapter:
        modules, problems = token_rows(source)
        rest = {key: ref for key, ref in source.tensors.items() if not is_token_key(key)}
        bases = {
            each.module_name: rest.pop(key)
            for each in modules
            if (key := f"{each.module_name}.base_layer.weight") in rest
        }
        replacements, leftovers = split_replacements(source, rest)
        raise_problems([*problems, *leftovers])
        return Adapter(source, "trainable_tokens", "plain", tuple(modules), replacements, bases)
