"""What `collect` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from corda_convert.corpus import CorpusOptions
from corda_convert.errors import CordaConvertError, UnsupportedInput
from corda_convert.operations.collect_statistics import Normalization, Precision

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """Whose inputs are collected, on which text, and how they are summed.

    Attributes:
        corpus: the text.
        targets: modules, as `decompose` takes them; nothing for every Linear but the head.
        excluded: modules to leave out.
        normalization: `peft` divides each sample by its largest entry and the sum by their number, `none` sums.
        experts: `shared` collects one covariance for all experts of a layer that were named, `each` one for each.
        precision: of the products; sums are float64 in any case.
        batch_tokens: tokens that are run at a time, one sample at least.
        whole_model: load the whole model instead of one block at a time.
        offload: folder for hidden states; None for host memory.
        trust_remote_code: run the code that the model brings along.
        max_shard_bytes: of a file, where the output is a folder.
    """

    corpus: CorpusOptions
    targets: str | tuple[str, ...] = ()
    excluded: str | tuple[str, ...] = ()
    normalization: Normalization = "peft"
    experts: Literal["shared", "each"] = "shared"
    precision: Precision = "float32"
    batch_tokens: int = 8192
    whole_model: bool = False
    offload: Path | None = None
    trust_remote_code: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES

    def problems(self) -> list[CordaConvertError]:
        """Why these options cannot be met, whatever the model."""
        problems: list[CordaConvertError] = []
        for value, option in ((self.batch_tokens, "--batch-tokens"), (self.max_shard_bytes, "--max-shard-size")):
            if value < 1:
                problems.append(UnsupportedInput(f"{option} is {value}; 1 at least was expected."))
        if self.whole_model and self.offload is not None:
            problems.append(UnsupportedInput("--offload is for hidden states between blocks; --whole-model has none."))
        return problems

    def described(self) -> dict[str, Any]:
        """For the receipt."""
        corpus = self.corpus
        return {
            "data": [file.name for file in corpus.files] or corpus.preset,
            "field": list(corpus.field),
            "chat": corpus.chat,
            "seq_len": corpus.seq_len,
            "samples": corpus.samples,
            "seed": corpus.seed,
            "pack": corpus.pack,
            "targets": [self.targets] if isinstance(self.targets, str) else list(self.targets),
            "excluded": [self.excluded] if isinstance(self.excluded, str) else list(self.excluded),
            "normalize": self.normalization,
            "experts": self.experts,
            "precision": self.precision,
            "batch_tokens": self.batch_tokens,
            "whole_model": self.whole_model,
        }
