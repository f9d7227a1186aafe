"""The model that is merged into: as it is stored, and, where that is quantized, with plain weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.dequantized import DEQUANTIZED_DTYPE, dequantized, describe
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.quantized import Quantization, check_no_gguf, quantization_of, with_quantization
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.options import DTYPES, RunOptions
from corda_convert.operations.requantize import requantized
from corda_convert.operations.transforms import Rounding
from corda_convert.output.side_files import config_with_dtype
from corda_convert.plan.model import Produced


@dataclass(frozen=True, slots=True)
class Base:
    """A model to merge into.

    Attributes:
        stored: the checkpoint as it lies on disk: what is read.
        readable: the same with plain weights: what adapters are fitted to.
        quantization: how it is quantized, if it is.
        stays_quantized: whether the output is quantized too.
    """

    stored: Checkpoint
    readable: Checkpoint
    quantization: Quantization | None
    stays_quantized: bool

    @property
    def written(self) -> Checkpoint:
        """The checkpoint whose shards and config the output takes after."""
        return self.stored if self.stays_quantized else self.readable

    def touched(self, produced: Mapping[str, Sequence[Produced]]) -> Mapping[str, Sequence[Produced]]:
        """What takes the place of each touched tensor of `written`, from what was planned for `readable`."""
        return requantized(produced, self.readable) if self.stays_quantized else produced

    def config(self, changed: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The output's config where it is not the stored one: `changed`, which was made from `readable`'s, and what follows."""
        config = changed or self.readable.config
        if self.quantization is None or config is None:
            return changed
        if self.stays_quantized:
            return with_quantization(changed, self.stored.config or {}) if changed else None
        dtype = next(name for name, stored in DTYPES.items() if stored == DEQUANTIZED_DTYPE)
        return config_with_dtype(config, dtype)

    def warnings(self) -> tuple[str, ...]:
        """For the user: that the output is larger than the model."""
        if self.quantization is None or self.stays_quantized:
            return ()
        keep = "; --requantize keeps fp8" if self.quantization.method == "fp8" else ""
        return (
            f"{self.stored.name} is quantized with {self.quantization.method}: the output has plain weights{keep}. An adapter "
            "that was trained on a quantized model is best merged into the unquantized one.",
        )

    def facts(self) -> dict[str, Any]:
        """For the receipt."""
        if self.quantization is None:
            return {}
        facts = describe(self.quantization, self.stored, self.readable)
        return {"quantization": {**facts, "activation_scales_left_out": []} if self.stays_quantized else facts}


def read_base(path: Path, run: RunOptions, *, rounding: Rounding = "nearest", requantize: bool = False) -> Base:
    """Reads the headers of a model to merge into. Raises what `read_checkpoint` and `dequantized` do."""
    check_no_gguf(path)
    stored = read_checkpoint(path)
    specs = {name: ref.spec for name, ref in stored.tensors.items()}
    quantization = quantization_of(stored.config, specs, stored.root)
    if quantization is None:
        if requantize:
            raise UnsupportedInput(f"{stored.name} is not quantized.", next_step="Leave out --requantize.")
        return Base(stored, stored, None, stays_quantized=False)
    if requantize and (run.dtype is not None or rounding == "peft"):
        raise UnsupportedInput(
            "--requantize keeps every tensor's own dtype and rounds to the nearest fp8 number.",
            next_step="Leave out --requantize, or --dtype and --rounding.",
        )
    fp8_dtype = DEQUANTIZED_DTYPE if rounding == "peft" else "F32"
    return Base(stored, dequantized(stored, quantization, fp8_dtype), quantization, stays_quantized=requantize)
