"""The inputs of an output, given again: found, fetched where they are on the Hub, and compared with what the receipt names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.folder import missing_path
from corda_convert.checkpoint.remote_file import absent
from corda_convert.errors import AdapterMismatch, CordaConvertError, InputNotFound, MalformedFile, raise_problems
from corda_convert.operations.verify_again import OPTION_OF_ROLE, Options, Sources
from corda_convert.operations.verify_files import Scanned
from corda_convert.operations.verify_receipt import ListedFile, Sealed

Pair = tuple[str, ListedFile, Path]
"""An input's file: the input's role, what the receipt says of the file, and where it is given."""


def locate(sources: Sources) -> Sources:
    """The same, with names on the Hub as the folders of the cache that stand for them. Raises what `located` does."""
    from corda_convert.hub_reading import located

    def single(path: Path | None, what: str) -> Path | None:
        return None if path is None else located(path, what)

    return replace(
        sources,
        model=single(sources.model, "model"),
        adapters=tuple(located(path, "adapter") for path in sources.adapters),
        inits=tuple(located(path, "initial adapter") for path in sources.inits),
        residual=single(sources.residual, "residual"),
        covariances=single(sources.covariances, "covariances"),
    )


def input_files(sealed: Sealed, sources: Sources, scales: Sequence[float]) -> list[Pair]:
    """The files of each input that the receipt names, and that the check needs.

    Raises `InputNotFound` for what is missing, all together.
    """
    problems: list[CordaConvertError] = []
    pairs: list[Pair] = []
    left = {role: list(sources.of_role(role)) for role in OPTION_OF_ROLE}
    problems += [missing_path(path, "input") for path in sources.given if not (path.exists() or absent(path))]
    raise_problems(problems)
    for listed in sealed.inputs:
        option = OPTION_OF_ROLE.get(listed.role)
        if option is None or (listed.role == "covariances" and not left[listed.role]):
            continue
        if not left[listed.role]:
            problems.append(
                InputNotFound(
                    f"The receipt names {listed.name} as its {listed.role}, and it is not given.",
                    next_step=f"Give it with {option}.",
                )
            )
            continue
        given = left[listed.role].pop(0)
        for file in listed.files:
            path = given if given.is_file() else given / file.name
            if path.is_file() or absent(path) is not None:
                pairs.append((listed.role, file, path))
            else:
                problems.append(
                    InputNotFound(
                        f"{given} has no {file.name}, which the receipt names as a file of {listed.name}, its {listed.role}.",
                        why=f"This is another folder than the {listed.role} that the output was made of.",
                        next_step=f"Give that one with {option}.",
                    )
                )
    problems += _unnamed(sealed, sources)
    problems += _scale_problems(sealed, scales)
    raise_problems(problems)
    return pairs


def _unnamed(sealed: Sealed, sources: Sources) -> Iterator[CordaConvertError]:
    """Inputs that are given, and that the receipt does not name; a LoRA may be compared on any model."""
    options = (
        ("--adapter", sources.adapters),
        ("--init", sources.inits),
        ("--cov", () if sources.covariances is None else (sources.covariances,)),
    )
    for option, given in options:
        named = [listed for listed in sealed.inputs if OPTION_OF_ROLE.get(listed.role) == option]
        for path in given[len(named) :]:
            yield AdapterMismatch(
                f"{path} is given with {option}, and the receipt names {len(named) or 'none'} of that kind.",
                next_step="Leave it out, or give the folder that was made of it.",
            )


def _scale_problems(sealed: Sealed, scales: Sequence[float]) -> list[CordaConvertError]:
    recorded = Options(dict(sealed.options)).numbers("scales")
    given = tuple(float(scale) for scale in scales)
    if not given or given == recorded or (not recorded and set(given) == {1.0}):
        return []
    shown = ", ".join(f"{scale:g}" for scale in recorded) or "1 each"
    return [AdapterMismatch(f"The receipt says the scales {shown}; --scale says {', '.join(f'{s:g}' for s in given)}.")]


def compare(
    role: str, listed: ListedFile, given: Path, scanned: Mapping[Path, Scanned | OSError]
) -> tuple[dict[str, Any], CordaConvertError | None]:
    """Whether an input is the file that the receipt names, and by what that is known."""
    found = scanned[given]
    facts: dict[str, Any] = {"role": role, "name": listed.name, "by": "sha256" if listed.sha256 else "size and header"}
    if isinstance(found, OSError):
        return {**facts, "same": False}, MalformedFile(f"{given} cannot be read: {found.strerror or found}.")
    same = given.stat().st_size == listed.nbytes
    if listed.sha256 is not None:
        same = found.sha256 == listed.sha256
    elif listed.header_sha256 is not None and same:
        same = _header_digest(given) == listed.header_sha256
    problem = AdapterMismatch(
        f"{given} is not the {role} that the receipt names: its {'SHA-256' if listed.sha256 else 'size or header'} differs.",
        why="It is another model or adapter, or was changed since.",
    )
    return {**facts, "same": same}, None if same else problem


def _header_digest(path: Path) -> str | None:
    from corda_convert.checkpoint.safetensors_file import SafetensorsFile

    try:
        file = SafetensorsFile(path)
    except CordaConvertError:
        return None
    try:
        return file.header_sha256()
    finally:
        file.close()
