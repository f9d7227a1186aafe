"""Convert, merge and publish CorDA, PiSSA, LoRA and Bone/MiSS checkpoints, one shard at a time.

    from corda_convert import RunOptions, merge
    merge("base-model", adapter="adapter", output="merged", run=RunOptions(device="cpu"))

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corda_convert.errors import CordaConvertError
from corda_convert.version import __version__

if TYPE_CHECKING:
    from corda_convert.corpus.options import CorpusOptions
    from corda_convert.operations.decompose import DecomposeOptions, decompose
    from corda_convert.operations.from_cache import CacheOptions, decompose_from_cache
    from corda_convert.operations.inspect import Inspection, inspect
    from corda_convert.operations.merge import MergeOptions, merge
    from corda_convert.operations.options import Outcome, RunOptions
    from corda_convert.operations.perplexity import Perplexity, PerplexityOptions, perplexity
    from corda_convert.operations.plot_covs import plot_covs
    from corda_convert.operations.plot_spectrum import SpectrumOptions, plot_spectrum
    from corda_convert.operations.plot_truncation import plot_truncation
    from corda_convert.operations.push import push
    from corda_convert.operations.to_lora import ToLoraOptions, to_lora
    from corda_convert.operations.truncation import TruncationOptions, truncation_sweep
    from corda_convert.operations.verify import Verification, VerifyOptions, verify

_HOMES = {
    "decompose": "operations.decompose",
    "DecomposeOptions": "operations.decompose",
    "decompose_from_cache": "operations.from_cache",
    "CacheOptions": "operations.from_cache",
    "inspect": "operations.inspect",
    "Inspection": "operations.inspect",
    "merge": "operations.merge",
    "MergeOptions": "operations.merge",
    "to_lora": "operations.to_lora",
    "ToLoraOptions": "operations.to_lora",
    "push": "operations.push",
    "CorpusOptions": "corpus.options",
    "perplexity": "operations.perplexity",
    "Perplexity": "operations.perplexity",
    "PerplexityOptions": "operations.perplexity",
    "plot_covs": "operations.plot_covs",
    "plot_spectrum": "operations.plot_spectrum",
    "SpectrumOptions": "operations.plot_spectrum",
    "plot_truncation": "operations.plot_truncation",
    "truncation_sweep": "operations.truncation",
    "TruncationOptions": "operations.truncation",
    "verify": "operations.verify",
    "Verification": "operations.verify",
    "VerifyOptions": "operations.verify",
    "Outcome": "operations.options",
    "RunOptions": "operations.options",
}

__all__ = [
    "CacheOptions",
    "CordaConvertError",
    "CorpusOptions",
    "DecomposeOptions",
    "Inspection",
    "MergeOptions",
    "Outcome",
    "Perplexity",
    "PerplexityOptions",
    "RunOptions",
    "SpectrumOptions",
    "ToLoraOptions",
    "TruncationOptions",
    "Verification",
    "VerifyOptions",
    "__version__",
    "decompose",
    "decompose_from_cache",
    "inspect",
    "merge",
    "perplexity",
    "plot_covs",
    "plot_spectrum",
    "plot_truncation",
    "push",
    "to_lora",
    "truncation_sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"corda_convert.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'corda_convert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
