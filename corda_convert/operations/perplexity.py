"""`perplexity`: how well a model predicts a text, with or without an adapter, a block of it on the device at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.folder import RECEIPT_FILE, Checkpoint, read_json
from corda_convert.corpus.options import CorpusOptions, check_token_ids, limited_seq_len
from corda_convert.corpus.reading import read_documents, read_stream
from corda_convert.corpus.tokenizers import read_tokenizer
from corda_convert.corpus.windows import Window, sliding_windows
from corda_convert.errors import CordaConvertError, MalformedFile, UnsupportedInput, raise_problems
from corda_convert.hub_reading import fetch, located
from corda_convert.operations.adapted import Adapted, adapted
from corda_convert.operations.bases import read_base
from corda_convert.operations.options import DTYPES, RunOptions
from corda_convert.operations.window_losses import Losses, check_is_causal, window_losses
from corda_convert.streaming.architecture import Architecture, build_architecture
from corda_convert.version import __version__

if TYPE_CHECKING:
    import torch

FORMAT = "corda_convert.perplexity"
FORMAT_VERSION = 1

WINDOW = 2048
"""As in the papers, for models that have so many positions."""

MOST_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """What `perplexity` takes beside the model and the text.

    Attributes:
        adapters: folders of adapters, folded in as `merge` does.
        init: initial adapters of residual ones.
        as_is: trust that the adapters belong on this model.
        window: tokens that are run together; None for 2048, or as many positions as the model has.
        stride: tokens between the beginnings of two windows; None for the window, so that none overlap.
        max_tokens: measure no more than the first so many tokens of the text.
        batch_tokens: windows of equal length are run together up to so many tokens.
        device, dtype: where and in what the model is run; dtype None for the checkpoint's own.
        offload: a folder for hidden states, instead of host memory.
        whole_model: have all of the model on the device, for classes whose blocks cannot be run one by one.
        trust_remote_code: let code run that comes with the model.
        progress: show a progress bar on stderr.
    """

    adapters: Sequence[Path] = ()
    init: Sequence[Path] = ()
    as_is: bool = False
    window: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    batch_tokens: int = 4096
    device: str = "auto"
    dtype: str | None = None
    offload: Path | None = None
    whole_model: bool = False
    trust_remote_code: bool = False
    progress: bool = False


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What was measured.

    Attributes:
        losses: nats, summed over the scored tokens.
        facts: the JSON object, `perplexity` and `loss` (nats per token) among it.
        warnings: what the user should know.
    """

    losses: Losses
    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The exponential of the mean loss; infinite beyond e^700."""
        return perplexity_of(self.losses)


@dataclass(frozen=True, slots=True)
class Text:
    """A text in windows.

    Attributes:
        windows: what is run and scored.
        tokens: of the whole text, before it is cut into windows.
        facts: what it is, for the JSON object.
        warnings: what the user should know.
    """

    windows: Sequence[Window]
    tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def perplexity(
    model: Path | str,
    corpus: CorpusOptions,
    options: PerplexityOptions = PerplexityOptions(),
) -> Perplexity:
    """The perplexity of a text: exp of the mean of `−log p(token | those before it in its window)` over all scored tokens.

    The text is one stream of tokens, run in windows; with `pack=False` each record stands for itself. The same as
    transformers' own loss on the whole model, in the same dtype. Raises a `CordaConvertError`.
    """
    started = time.monotonic()
    raise_problems(_option_problems(corpus, options))
    device = RunOptions(device=options.device).torch_device()
    adapters = [located(path, "adapter") for path in options.adapters]
    init = [located(path, "initial adapter") for path in options.init]
    base = read_base(located(model, "model"), RunOptions())
    shards = [shard.path for shard in base.stored.shards]
    try:
        architecture, found = build_model(base.readable, options), Adapted(base.readable)
        text = read_text(base.readable.root, corpus, options, architecture.model.config)
        fetch(shards, progress=options.progress)
        if adapters:  # whose weights are compared with the model's
            found = adapted(
                base.readable,
                adapters,
                init=init,
                dtype=None if options.dtype is None else DTYPES[options.dtype],
                as_is=options.as_is,
                device=device,
            )
            architecture = build_model(found.checkpoint, options)
        losses = window_losses(
            architecture,
            text.windows,
            device=device,
            batch_tokens=options.batch_tokens,
            offload=options.offload,
            whole_model=options.whole_model,
            progress=options.progress,
        )
    finally:
        base.stored.close()
    facts = {**_head(found, text, losses, options), **text.facts, **_computed_in(architecture, device)}
    facts["seconds"] = round(time.monotonic() - started, 3)
    return Perplexity(losses, facts, (*found.warnings, *text.warnings))


def perplexity_of(losses: Losses) -> float:
    """The exponential of the mean loss; infinite beyond e^700."""
    return math.exp(losses.mean) if losses.mean < MOST_EXPONENT else math.inf


def build_model(checkpoint: Checkpoint, options: PerplexityOptions) -> Architecture:
    """The model without weights, in the dtype of the computation. Raises `UnsupportedInput` for one without perplexity."""
    import torch

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    architecture = build_architecture(checkpoint, dtype=dtype, trust_remote_code=options.trust_remote_code)
    check_is_causal(architecture.model)
    return architecture


def read_text(folder: Path, corpus: CorpusOptions, options: PerplexityOptions, config: Any) -> Text:
    """The text in windows, by the tokenizer of the model's folder. Raises `MalformedFile` where nothing can be scored."""
    tokenizer = read_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    window, warning = limited_seq_len(options.window or WINDOW, config)
    stride = window if options.stride is None else options.stride
    if stride > window:
        raise UnsupportedInput(
            f"--stride {stride} leaves out tokens between windows of {window}.",
            why=None if window == (options.window or WINDOW) else f"The model has no more than {window} positions.",
            next_step=f"Choose a --stride from 1 to {window}.",
        )
    if corpus.pack is False:
        texts = [document.token_ids for document in read_documents(corpus, tokenizer, evaluation=True)]
    else:
        texts = [read_stream(corpus, tokenizer, evaluation=True)]
    tokens = sum(map(len, texts))
    if options.max_tokens is not None:
        texts = _first(texts, options.max_tokens)
    windows = [each for text in texts for each in sliding_windows(text, window, stride)]
    if not windows:
        measured = "" if options.max_tokens is None else f", of which --max-tokens {options.max_tokens} are measured"
        raise MalformedFile(f"{_name(corpus)} has {tokens} tokens{measured}: there is none with another before it.")
    check_token_ids(texts, config)
    facts = {
        "text": _name(corpus),
        "records_apart": corpus.pack is False,
        "text_tokens": tokens,
        "window": window,
        "stride": stride,
        "windows": len(windows),
    }
    is_told = warning is not None and options.window is not None
    return Text(windows, tokens, facts, (warning.replace("Samples", "Windows"),) if warning and is_told else ())


def _first(texts: Sequence[list[int]], most: int) -> list[list[int]]:
    found: list[list[int]] = []
    for text in texts:
        found.append(text[:most])
        most -= len(found[-1])
        if most <= 0:
            break
    return found


def _name(corpus: CorpusOptions) -> str:
    return corpus.preset or ", ".join(file.name for file in corpus.files)


def _option_problems(corpus: CorpusOptions, options: PerplexityOptions) -> list[CordaConvertError]:
    problems: list[CordaConvertError] = []
    if options.dtype is not None and options.dtype not in DTYPES:
        problems.append(
            UnsupportedInput(f"Unknown dtype {options.dtype!r}.", next_step=f"Choose one of {', '.join(DTYPES)}.")
        )
    if options.init and not options.adapters:
        problems.append(UnsupportedInput("--init goes with --adapter.", next_step="Give the trained adapter, too."))
    for count, option in ((options.max_tokens, "--max-tokens"), (options.batch_tokens, "--batch-tokens")):
        if count is not None and count < 1:
            problems.append(UnsupportedInput(f"{option} is {count}; it is 1 at least."))
    try:
        corpus.check()
    except CordaConvertError as problem:
        problems.append(problem)
    return problems


def _head(found: Adapted, text: Text, losses: Losses, options: PerplexityOptions) -> dict[str, Any]:
    value = perplexity_of(losses)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": {"name": "corda-convert", "version": __version__},
        "model": found.checkpoint.name,
        "adapters": list(found.adapters),
        "truncation": truncation_of(found.checkpoint.root),
        "perplexity": value if math.isfinite(value) else None,
        "loss": losses.mean,
        "tokens": losses.tokens,
        "max_tokens": options.max_tokens,
    }


def _computed_in(architecture: Architecture, device: torch.device) -> dict[str, Any]:
    return {"dtype": str(architecture.dtype).removeprefix("torch."), "device": str(device)}


def truncation_of(folder: Path) -> dict[str, Any] | None:
    """What `decompose --truncate` took out of a model, by its receipt: `method` and `discarded`."""
    file = folder / RECEIPT_FILE
    if not file.is_file():
        return None
    said = read_json(file).get("options")
    if not isinstance(said, dict) or not isinstance(said.get("truncate"), int):
        return None
    return {"method": said.get("method"), "discarded": said["truncate"]}
