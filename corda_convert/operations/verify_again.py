"""The recorded command planned again from the inputs that are given again, without looking at any output's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER
from corda_convert.distributed import Alone, Place
from corda_convert.errors import MalformedFile, UnsupportedInput
from corda_convert.operations.verify_receipt import Sealed

if TYPE_CHECKING:
    from corda_convert.operations.lora_modules import LoraSource
    from corda_convert.plan.model import Plan


@dataclass(frozen=True, slots=True)
class Sources:
    """The inputs of the command, given again.

    Attributes:
        model: the model that was decomposed, merged into, or that a LoRA is for.
        adapters: in the order of the receipt.
        inits: initial adapters, or the cache of `decompose --from-cache`.
        residual: the residual, or for `to-lora --from-checkpoints` the fine-tune.
        covariances: of `decompose`, or those that `to-lora --weight-by` had.
    """

    model: Path | None = None
    adapters: tuple[Path, ...] = ()
    inits: tuple[Path, ...] = ()
    residual: Path | None = None
    covariances: Path | None = None

    @property
    def given(self) -> list[Path]:
        """Every path."""
        single = (self.model, self.residual, self.covariances)
        return [*(path for path in single if path is not None), *self.adapters, *self.inits]

    def of_role(self, role: str) -> tuple[Path, ...]:
        """What is given for the inputs of one role in a receipt."""
        single = {"model": self.model, "base": self.model, "residual": self.residual, "tuned": self.residual}
        single["covariances"] = self.covariances
        if role in single:
            path = single[role]
            return () if path is None else (path,)
        if role == "init" and not self.inits and self.residual is not None:  # which holds what the training began with
            return (self.residual / INITIAL_ADAPTER_FOLDER,)
        return {"adapter": self.adapters, "init": self.inits, "cache": self.inits}.get(role, ())


class _Onlooker(Alone):
    """A process that is not the first one, and so makes no output: whether there is room for one is not asked."""

    place = Place(rank=1, size=1, local_rank=0, local_size=1)


OPTION_OF_ROLE = {
    "model": "--against",
    "base": "--against",
    "adapter": "--adapter",
    "init": "--init",
    "cache": "--init",
    "residual": "--residual",
    "tuned": "--residual",
    "covariances": "--cov",
}


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a receipt, each checked for its type when it is asked for."""

    values: dict[str, Any]

    def text(self, name: str) -> str | None:
        value = self._of(name, str)
        return None if value is None else str(value)

    def number(self, name: str) -> float | None:
        value = self._of(name, int, float)
        return None if value is None else float(value)

    def flag(self, name: str) -> bool:
        return bool(self._of(name, bool))

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(float(value) for value in self._list(name, int, float))

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(str(value) for value in self._list(name, str))

    def _of(self, name: str, *types: type) -> Any:
        value = self.values.get(name)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise _odd(name, value)
        return value

    def _list(self, name: str, *types: type) -> list[Any]:
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(each, types) for each in value):
            raise _odd(name, value)
        return value


def _odd(name: str, value: object) -> MalformedFile:
    return MalformedFile(
        f"The receipt's option {name} is {str(value)[:60]!r}, which is none.", next_step="Make the folder again."
    )


def expected_plan(sealed: Sealed, sources: Sources) -> Plan:
    """The plan of the files that the command wrote: for `decompose` that of taking its own factors out of the model.

    Raises one of our errors where the inputs do not go together.
    """
    from corda_convert.operations.merge import MergeOptions, merge
    from corda_convert.operations.options import RunOptions

    options = Options(dict(sealed.options))
    run = RunOptions(device="cpu", dtype=options.text("dtype"), dry_run=True, ranks=_Onlooker())
    model, place = _model(sources), sealed.folder
    if sealed.command == "decompose":
        taken = MergeOptions(subtract=sealed.folder / INITIAL_ADAPTER_FOLDER, as_is=True)
        return merge(model, output=place, options=taken, run=run).plan
    if sealed.command != "merge":
        raise UnsupportedInput(f"{sealed.command} is not recomputed.")
    if options.text("subtract") is not None:
        taken = MergeOptions(subtract=_one(sources.inits, "--init"), as_is=options.flag("as_is"))
        return merge(model, output=place, options=taken, run=run).plan
    chosen = MergeOptions(
        init=sources.inits or None,
        scales=options.numbers("scales"),
        residual=sources.residual,
        alpha=options.number("alpha"),
        format=options.text("format"),  # type: ignore[arg-type]
        rounding=options.text("rounding") or "nearest",  # type: ignore[arg-type]
        requantize=options.flag("requantize"),
        as_is=options.flag("as_is"),
    )
    return merge(model, adapter=sources.adapters, output=place, options=chosen, run=run).plan


def expected_lora(sealed: Sealed, sources: Sources) -> LoraSource:
    """What `to-lora` was to put together. Raises one of our errors where the inputs do not go together."""
    from corda_convert.checkpoint.folder import read_checkpoint
    from corda_convert.operations.lora_adapters import Given, from_adapters
    from corda_convert.operations.lora_checkpoints import from_checkpoints

    options = Options(dict(sealed.options))
    if options.names("from_checkpoints"):
        return from_checkpoints(_model(sources), _one((sources.residual,), "--residual"))
    base = None if sources.model is None else read_checkpoint(sources.model)
    scales = options.numbers("scales")
    as_is = options.flag("as_is")
    return from_adapters(Given(sources.adapters, sources.inits, scales, base, sources.residual, as_is))


def _model(sources: Sources) -> Path:
    return _one((sources.model,), "--against")


def _one(paths: Sequence[Path | None], option: str) -> Path:
    if len(paths) != 1 or paths[0] is None:
        raise UnsupportedInput(f"One {option} was expected, {len(paths)} are given.")
    return paths[0]
