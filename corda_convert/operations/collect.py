"""`collect`: covariances of the inputs of a model's layers, with one block of it loaded at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.dequantized import dequantized
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.quantized import quantization_of
from corda_convert.corpus import read_corpus
from corda_convert.corpus.options import check_token_ids, limited_seq_len
from corda_convert.corpus.tokenizers import read_tokenizer
from corda_convert.errors import UnsupportedInput, raise_problems, some
from corda_convert.hub_reading import fetch, located
from corda_convert.linalg.gram import Spare
from corda_convert.operations.collect_job import CollectJob
from corda_convert.operations.collect_options import CollectOptions
from corda_convert.operations.collect_sealing import expected_headers, seal
from corda_convert.operations.collect_stage import Stage
from corda_convert.operations.collect_targets import Wanted, wanted_inputs
from corda_convert.operations.collect_work import Finished, Work, working
from corda_convert.operations.collect_writing import check_covariance_output
from corda_convert.operations.options import RunOptions
from corda_convert.output.staging import check_space, held_bytes
from corda_convert.streaming.architecture import build_architecture
from corda_convert.streaming.stream import Batch, LayerStream, make_batches
from corda_convert.streaming.threads import ModelThreads
from corda_convert.streaming.whole import run_whole

if TYPE_CHECKING:
    from torch import Tensor

    from corda_convert.linalg.threads import Team


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` wrote, or would write.

    Attributes:
        output: the file or folder.
        receipt: what was done, as `--json` prints it.
        warnings: what the user should look at.
    """

    output: Path
    receipt: dict[str, Any]
    warnings: tuple[str, ...] = ()


def collect(
    model: Path | str,
    *,
    output: Path | str,
    options: CollectOptions,
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Collected:
    """Writes the covariances and mean absolute inputs of the model's Linear layers on a text.

    One block of the model is on the device at a time. `output` is a file if it ends in `.safetensors`, else a folder with
    an index. An interrupted run is gone on with by the same call. Raises a `CordaConvertError`; then nothing was written.
    """
    job = _prepare(model, Path(output), options, run)
    if run.dry_run:
        return Collected(job.output, {**job.receipt(), "plan": job.plan()}, job.warnings())
    begun = time.perf_counter()
    with run.ranks.leaving():
        fetch([shard.path for shard in job.checkpoint.shards], progress=run.progress)
        if run.ranks.place.rank > 0:
            _run(job, None)
            run.ranks.exchange(None)
            return Collected(job.output, job.receipt(), ())
        check_space(job.output, job.least_bytes() - held_bytes(job.output))
        with working(job.output, job.identity(), overwrite=run.overwrite, room=job.room()) as work:
            finished = _run(job, work)
            receipt = seal(job, work, finished, begun)
            run.ranks.exchange(None)
    return Collected(job.output, receipt, tuple(receipt["warnings"]))


def _prepare(model: Path | str, output: Path, options: CollectOptions, run: RunOptions) -> CollectJob:
    """Reads headers and text, and checks everything. Raises what is wrong, nothing being written."""
    import torch

    raise_problems(options.problems())
    check_covariance_output(output, overwrite=run.overwrite)
    checkpoint = read_checkpoint(located(model, "model"))
    quantization = quantization_of(
        checkpoint.config, {name: ref.spec for name, ref in checkpoint.tensors.items()}, checkpoint.root
    )
    if quantization is not None:
        checkpoint = dequantized(checkpoint, quantization, "BF16")
    dtype = None if run.dtype is None else getattr(torch, run.dtype)
    device = run.torch_device()
    architecture = build_architecture(checkpoint, dtype=dtype, trust_remote_code=options.trust_remote_code)
    wanted = wanted_inputs(architecture, options)
    if wanted.stacks:
        architecture.model.config._experts_implementation = "eager"
    seq_len, shortened = limited_seq_len(options.corpus.seq_len, architecture.model.config)
    text = replace(options.corpus, seq_len=seq_len)
    corpus = read_corpus(text, read_tokenizer(checkpoint.root, trust_remote_code=options.trust_remote_code))
    check_token_ids(corpus.samples, architecture.model.config)
    if shortened is not None and max(map(len, corpus.samples)) == seq_len:
        corpus = replace(corpus, warnings=(shortened, *corpus.warnings))
    is_alone = bool(wanted.stacks) or any(".experts." in name for name in wanted.widths)
    batches = make_batches(corpus.samples, 1 if is_alone else options.batch_tokens)
    return CollectJob(checkpoint, architecture, corpus, tuple(batches), wanted, output, options, run, device)


def _run(job: CollectJob, work: Work | None) -> list[Finished]:
    """Runs the model; rank 0, which has the work folder, keeps what each part gives."""
    from corda_convert.linalg.threads import Team

    own, group_ends = _share(job)
    batches = tuple(job.batches[place] for place in own)
    threads = ModelThreads(job.device, job.at_once)
    with threads, Team(job.device) as team, _progress(job, len(batches)) as tick:
        runner = _Runner(job, work, batches, group_ends, team, tick)
        if job.options.whole_model:
            with threads.share():
                runner.part(job.wanted, lambda stage: run_whole(job.architecture, batches, job.device, stage.end_batch))
            return runner.parts
        stream = LayerStream(job.architecture, batches, device=job.device, offload=job.options.offload, threads=threads)
        with contextlib.closing(stream):
            outside = job.wanted.outside(stream.blocks)
            seen = runner.part(outside, lambda stage: stream.embed(stage.end_batch), is_partial=True)
            for index in range(len(stream.blocks.modules)):
                inside = job.wanted.within(stream.blocks.name(index))
                runner.part(inside, partial(_run_block, stream, index))
            rest = outside.without(seen)
            if rest:
                runner.part(rest, lambda stage: _run_head(stream, stage))
    return runner.parts


def _run_block(stream: LayerStream, index: int, ticking: _Ticking) -> None:
    stream.run_block(index, ticking.end_batch, ticking.stage.taps)


def _run_head(stream: LayerStream, stage: Stage) -> None:
    for place in range(len(stream.batches)):
        stream.logits(place)
        stage.end_batch(place)


def _share(job: CollectJob) -> tuple[list[int], frozenset[int]]:
    """The places of this process's batches, and after which of them a group ends, by their number among its own."""
    groups, place = job.groups(), job.run.ranks.place
    if len(groups) < place.size:
        raise UnsupportedInput(
            f"There are {len(groups)} groups of samples for {place.size} processes.",
            next_step="Start fewer processes, take more --samples, or fewer --batch-tokens.",
        )
    mine = groups[place.rank * len(groups) // place.size : (place.rank + 1) * len(groups) // place.size]
    own: list[int] = []
    ends = set()
    for group in mine:
        own += group
        ends.add(len(own) - 1)
    return own, frozenset(ends)


class _Runner:
    """Runs one part of the model after the other, and keeps the sums of those that are not finished yet."""

    def __init__(
        self,
        job: CollectJob,
        work: Work | None,
        batches: tuple[Batch, ...],
        group_ends: frozenset[int],
        team: Team,
        tick: Callable[[], object],
    ) -> None:
        self._job = job
        self._work = work
        self._batches = batches
        self._group_ends = group_ends
        self._modules = dict(job.architecture.model.named_modules())
        self._team = team
        self._spare = Spare()
        self._being_written: list[Tensor] = []
        self._tick = tick
        self.parts: list[Finished] = []

    def part(self, wanted: Wanted, run: Callable[[Any], None], *, is_partial: bool = False) -> set[str]:
        """Runs a part. Returns the modules whose inputs were seen; `is_partial` says that others run elsewhere."""
        job, ranks = self._job, self._job.run.ranks
        number = len(self.parts)
        before = self._work.finished(number) if self._work is not None else None
        finished = next(iter(ranks.exchange(before)))
        is_new = finished is None
        stage = Stage(
            {name: self._modules[name] for name in wanted.widths} if is_new else {},
            wanted.stacks if is_new else {},
            options=job.options,
            device=job.device,
            batches=self._batches,
            group_ends=self._group_ends,
            team=self._team,
            spare=self._spare,
        )
        with stage.watching():
            run(_Ticking(stage, self._tick))
        result = stage.finish(job.samples, ranks)
        if finished is None:
            finished = Finished((), result.aliases, result.tokens)
            if self._work is not None:
                finished = self._work.keep(number, result, partial(expected_headers, job, number))
                self._spare.give(*self._being_written)  # since `keep` waited until they were
                self._being_written = [tensor for tensor in result.tensors.values() if tensor.ndim == 2]
        self._spare.end_part()
        self.parts.append(finished)
        ranks.check()
        seen = {name.removesuffix(".mean_abs") for name in finished.tokens} | set(finished.aliases)
        missing = [name for name in wanted.widths if name not in seen]
        if missing and not is_partial:
            raise UnsupportedInput(
                f"No input reached {len(missing)} modules: {some(missing)}.",
                why="The model does not run them on this text.",
                next_step="Leave them out with --exclude.",
            )
        return seen


@dataclass(frozen=True, slots=True)
class _Ticking:
    """A stage that also tells the progress bar."""

    stage: Stage
    tick: Callable[[], object]

    def end_batch(self, place: int, states: object = None) -> None:
        self.stage.end_batch(place, states)
        self.tick()


@contextlib.contextmanager
def _progress(job: CollectJob, batches: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr, by batches."""
    import sys

    from tqdm import tqdm

    parts = 1 if job.options.whole_model else 1 + job.architecture.model.config.get_text_config().num_hidden_layers
    is_quiet = not job.run.progress or not sys.stderr.isatty()
    with tqdm(total=parts * batches, unit="batch", desc="collect", disable=is_quiet) as bar:
        yield lambda: bar.update()
