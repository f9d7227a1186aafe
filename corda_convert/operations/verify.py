"""`verify`: whether an output folder is complete, intact and what its receipt says, and whether its numbers are right.

The receipt's files are read once, for their digests and for NaN and Inf; without `against` nothing is computed, and torch is
not imported.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.errors import CordaConvertError, MalformedFile, some
from corda_convert.hub_reading import fetch
from corda_convert.operations.verify_again import Sources
from corda_convert.operations.verify_files import Scan, Scanned, scan_all, scan_of
from corda_convert.operations.verify_inputs import Pair, compare, input_files, locate
from corda_convert.operations.verify_receipt import Sealed, read_sealed
from corda_convert.operations.verify_structure import Structure, check_structure

if TYPE_CHECKING:
    from corda_convert.operations.verify_against import Recomputed
    from corda_convert.operations.verify_ulps import Checked

VERIFICATION_FORMAT = "corda_convert.verification"
VERIFICATION_FORMAT_VERSION = 1

DEFAULT_SAMPLE = 16
"""So many tensors of each kind are computed again."""

_Path = Path | str


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What `verify` takes beside the folder. With `against` its numbers are computed again.

    Attributes:
        against: the model that it was made from, or that a converted LoRA is for; for `to-lora --from-checkpoints` the base.
        adapters: the trained adapters.
        init: their initial adapters, or the cache of `decompose --from-cache`.
        residual: the residual model, or for `to-lora --from-checkpoints` the fine-tune.
        covariances: those of `decompose`, which show whether its factors are singular vectors.
        scales: how many times each adapter was taken; what the receipt says, where none are given.
        sample: how many tensors of each kind are computed again; None for all.
        seed: chooses them; None for another one each time.
        progress: show a progress bar on stderr.
    """

    against: _Path | None = None
    adapters: Sequence[_Path] = ()
    init: Sequence[_Path] = ()
    residual: _Path | None = None
    covariances: _Path | None = None
    scales: Sequence[float] = ()
    sample: int | None = DEFAULT_SAMPLE
    seed: int | None = None
    progress: bool = False

    @property
    def sources(self) -> Sources:
        return Sources(
            model=None if self.against is None else Path(self.against),
            adapters=tuple(map(Path, self.adapters)),
            inits=tuple(map(Path, self.init)),
            residual=None if self.residual is None else Path(self.residual),
            covariances=None if self.covariances is None else Path(self.covariances),
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found.

    Attributes:
        facts: the JSON object; docs/receipt.md has its keys.
        is_fine: whether nothing is wrong.
    """

    folder: Path
    facts: Mapping[str, Any]
    is_fine: bool


def verify(folder: Path | str, *, options: VerifyOptions = VerifyOptions()) -> Verification:
    """Checks an output folder against its receipt, and with `options.against` its numbers against its inputs.

    Raises a `CordaConvertError` for a folder without a readable receipt, and for inputs that are not given or not there.
    Everything that is wrong in the folder is in the result, all together.
    """
    path = Path(folder)
    sealed = read_sealed(path)
    is_recomputed = options.sources != Sources() or bool(options.scales)
    sources = locate(options.sources) if is_recomputed else options.sources
    pairs = input_files(sealed, sources, options.scales) if is_recomputed else []
    if pairs:
        fetch([given for _, _, given in pairs], progress=options.progress)
    structure = check_structure(sealed)
    try:
        scans = _scans(sealed, structure)
        with _progress(scans, pairs, options) as advance:
            scanned = scan_all([*scans.values(), *(Scan(given) for _, _, given in pairs)], advance)
        problems = [*structure.problems, *_digest_problems(sealed, scans, scanned)]
        not_finite = _not_finite(scans, scanned)
        inputs = [compare(role, listed, given, scanned) for role, listed, given in pairs]
        problems += [problem for _, problem in inputs if problem is not None]
        recomputed, seed = None, None
        if is_recomputed:
            seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
            recomputed = _recompute(sealed, structure, sources, options, seed)
            problems += recomputed.problems
    finally:
        structure.close()
    unchanged = _same_as_input(recomputed)
    problems += [
        _not_finite_problem(file, [name for name in names if name not in unchanged]) for file, names in not_finite
    ]
    found = [single for problem in problems for single in getattr(problem, "problems", (problem,)) if single.what]
    facts = {
        **_head(path),
        "is_fine": not found,
        "command": sealed.command,
        "problems": [describe_problem(problem) for problem in found],
        "files": {"count": len(sealed.files), "bytes": sum(file.nbytes for file in sealed.files.values())},
        "hidden_files": structure.ignored,
        "tensors": len(sealed.tensors),
        "from_input_not_finite": sorted(unchanged & {name for _, names in not_finite for name in names}),
        "inputs": [facts for facts, _ in inputs],
        "recomputed": None if recomputed is None else _recomputed_facts(recomputed, options, seed),
    }
    return Verification(path, facts, not found)


def failure(path: Path, problem: CordaConvertError) -> dict[str, Any]:
    """The JSON object of a folder that could not be verified at all."""
    problems = [describe_problem(each) for each in getattr(problem, "problems", (problem,))]
    return {**_head(path), "is_fine": False, "problems": problems}


def describe_problem(problem: CordaConvertError) -> dict[str, str | None]:
    """A problem as JSON."""
    return {"what": problem.what, "why": problem.why, "next_step": problem.next_step}


def _head(path: Path) -> dict[str, Any]:
    return {"format": VERIFICATION_FORMAT, "format_version": VERIFICATION_FORMAT_VERSION, "path": str(path)}


def _scans(sealed: Sealed, structure: Structure) -> dict[str, Scan]:
    return {
        name: scan_of(structure.files[name]) if name in structure.files else Scan(sealed.folder / name)
        for name in structure.sound
    }


def _progress(scans: Mapping[str, Scan], pairs: Sequence[Pair], options: VerifyOptions) -> Any:
    """A bar by bytes on stderr, only on a terminal. What it yields is called with the bytes that were read."""
    import contextlib

    from tqdm import tqdm

    total = sum(path.stat().st_size for path in [*(scan.path for scan in scans.values()), *(each[2] for each in pairs)])

    @contextlib.contextmanager
    def shown() -> Iterator[Any]:
        with tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            disable=None if options.progress else True,
            file=sys.stderr,
            leave=False,
        ) as bar:
            yield bar.update

    return shown()


def _digest_problems(
    sealed: Sealed, scans: Mapping[str, Scan], scanned: Mapping[Path, Scanned | OSError]
) -> Iterator[CordaConvertError]:
    for name, scan in scans.items():
        found = scanned[scan.path]
        if isinstance(found, OSError):
            yield MalformedFile(f"{name} cannot be read: {found.strerror or found}.")
        elif found.sha256 != sealed.files[name].sha256:
            yield MalformedFile(
                f"{name} was changed: its SHA-256 is {found.sha256[:12]}…, the receipt says "
                f"{str(sealed.files[name].sha256)[:12]}….",
                why="A copy went wrong, or it was edited.",
            )


def _not_finite(
    scans: Mapping[str, Scan], scanned: Mapping[Path, Scanned | OSError]
) -> list[tuple[str, tuple[str, ...]]]:
    found = ((name, scanned[scan.path]) for name, scan in scans.items())
    return [(name, each.not_finite) for name, each in found if isinstance(each, Scanned) and each.not_finite]


def _not_finite_problem(file: str, names: Sequence[str]) -> CordaConvertError:
    if not names:
        return MalformedFile("")
    return MalformedFile(
        f"{len(names)} tensors in {file} hold NaN or Inf: {some(names)}.",
        why="They were altered, or copied from a model that holds such: --against MODEL tells.",
    )


def _same_as_input(recomputed: Recomputed | None) -> set[str]:
    """Tensors that are the bits of an input, so that what they hold is the input's."""
    checked: Sequence[Checked] = () if recomputed is None else recomputed.checked
    return {each.name for each in checked if each.how == "bits" and each.is_right}


def _recompute(sealed: Sealed, structure: Structure, sources: Sources, options: VerifyOptions, seed: int) -> Recomputed:
    from tqdm import tqdm

    from corda_convert.operations.verify_against import Sample, recompute

    with tqdm(unit=" tensors", disable=None if options.progress else True, file=sys.stderr, leave=False) as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(1)

        return recompute(sealed, structure.files, sources, Sample(options.sample, seed), advance)


@dataclass(slots=True)
class _Kind:
    """What the tensors of one kind come to."""

    checked: int = 0
    entries: int = 0
    wrong: int = 0
    same_bits: int = 0
    ulps: float = 0.0
    worst: str | None = None
    how: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, each: Checked) -> None:
        self.checked, self.entries = self.checked + 1, self.entries + each.measured.entries
        self.wrong += not each.is_right
        self.same_bits += each.measured.same_bits
        self.how[each.how] = self.how.get(each.how, 0) + 1
        if self.worst is None or each.measured.ulps > self.ulps:
            self.ulps, self.worst = max(each.measured.ulps, self.ulps), each.name
        for name, value in each.figures.items():
            self.figures[name] = max(value, self.figures.get(name, 0.0))


def _recomputed_facts(recomputed: Recomputed, options: VerifyOptions, seed: int | None) -> dict[str, Any]:
    kinds = {kind: _Kind() for kind in recomputed.of}
    for each in recomputed.checked:
        kinds[each.kind].add(each)
    return {
        "sample": "all" if options.sample is None else options.sample,
        "seed": seed,
        "kinds": {
            name: {
                "of": recomputed.of[name],
                "checked": kind.checked,
                "numbers": kind.entries,
                "wrong": kind.wrong,
                "nearest": kind.same_bits,
                "largest_error_ulp": kind.ulps if kind.ulps < float("inf") else None,
                "worst": kind.worst,
                "how": kind.how,
                **kind.figures,
            }
            for name, kind in kinds.items()
        },
        "not_recomputed": recomputed.skipped,
    }
