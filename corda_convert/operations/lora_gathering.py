"""The modules of one LoRA, put together of several adapters: factors, blocks and what the adapters bring along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from corda_convert.adapters.bias import LoraBias
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter, ParameterChange
from corda_convert.adapters.initial import with_initial
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.miss import BlockFactors
from corda_convert.adapters.source import PEFT_PREFIX, strip_key
from corda_convert.adapters.tokens import TokenRows
from corda_convert.checkpoint.comparison import same_values
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput
from corda_convert.operations.belonging import Part, matrices
from corda_convert.operations.edits import Fitted
from corda_convert.operations.lora_blocks import BatChange, block_module
from corda_convert.operations.lora_brought import without_known_weights
from corda_convert.operations.lora_dense import Difference, added
from corda_convert.operations.lora_dense import scaled as scaled_change
from corda_convert.operations.lora_modules import OUT_PROJ, Carried, DenseChange, LoraModule, Summand
from corda_convert.operations.lora_parameters import parameter_module, place_of
from corda_convert.operations.residual import Residual
from corda_convert.operations.shares import Matrices


@dataclass(slots=True)
class Gathered:
    """What the adapters that were added come to.

    Attributes:
        base: the base model, where it can be read.
        residual: the model that the one adapter was trained beside, in the place of its initial factors.
        is_alone: whether there is one adapter, whose scaling the result may keep.
        can_read: false in a dry run whose models are on the Hub: then their weights are not compared.
        modules: by what tells them apart.
        carried: tensors by their names in the result.
        biases: of lora_B, of several adapters, by the module's key, each with how many times it is taken.
        problems: what does not fit.
    """

    base: Checkpoint | None
    residual: Residual | None
    is_alone: bool
    can_read: bool
    modules: dict[str, LoraModule] = field(default_factory=dict)
    carried: dict[str, Carried] = field(default_factory=dict)
    biases: dict[str, list[tuple[TensorRef, float]]] = field(default_factory=dict)
    problems: list[CordaConvertError] = field(default_factory=list)

    def weights(self, fitted: Iterable[Fitted]) -> Matrices:
        """The base's own matrices of the adapted modules, where it can be read."""
        return {} if self.base is None else matrices(list(fitted), self.base)

    def add(self, part: Part, fitted: Sequence[Fitted]) -> None:
        """Adds one adapter, with its parameters in the base where that was read."""
        adapter = without_known_weights(part, self.weights(fitted) if self.can_read else {}, self.residual)
        if part.initial is not None:
            adapter = with_initial(adapter, part.initial, takes_parameters=True)
        for module in _modules(adapter, part, {_name(each.change): each for each in fitted}, self):
            self._add_module(module, part)
        for bias in (change for change in adapter.modules if isinstance(change, LoraBias)):
            self._add_bias(bias, part.scale)
        for carried in _carried(adapter):
            before = self.carried.setdefault(carried.name, carried)
            if before is not carried and not same_values(before.ref, carried.ref):
                self.problems.append(
                    AdapterMismatch(
                        f"Two adapters bring {carried.name} along, and not the same.",
                        why="A tensor that replaces the model's cannot be added to another.",
                    )
                )

    def _add_module(self, module: LoraModule, part: Part) -> None:
        own = module if self.is_alone else _unscaled(module)
        place = place_of(own)
        before = self.modules.get(place)
        if before is None:
            self.modules[place] = own
        elif _form(before) != _form(own):
            self.problems.append(
                AdapterMismatch(
                    f"{place} is {_form(before)[0]} in one adapter, {_form(own)[0]} in {part.name}.",
                    why="The adapters are for different models.",
                )
            )
        else:
            self.modules[place] = added(before, own)

    def _add_bias(self, bias: LoraBias, scale: float) -> None:
        key, times = strip_key(bias.bias.name), bias.scaling * scale
        if self.is_alone:
            name = f"{PEFT_PREFIX}{key}"
            self.carried[name] = Carried(name, bias.bias, times)
        else:
            self.biases.setdefault(key.removesuffix(".lora_B.bias"), []).append((bias.bias, times))


def _form(module: LoraModule) -> tuple[object, ...]:
    """What modules that are added up have in common; the matrix's shape first, of a stack with the number of experts."""
    shape = (module.experts, *module.shape) if module.is_parameter else module.shape
    return shape, module.kernel, module.is_embedding


def _unscaled(module: LoraModule) -> LoraModule:
    """The same with the scaling in each summand, for those of other adapters to join."""
    own = tuple(replace(summand, factor=summand.factor * module.scaling) for summand in module.summands)
    return replace(module, summands=own, scaling=1.0)


def _modules(adapter: Adapter, part: Part, fitted: Mapping[str, Fitted], gathered: Gathered) -> Iterable[LoraModule]:
    residual, weights = gathered.residual, gathered.weights(fitted.values())
    keys = {_key(change) for change in adapter.modules if isinstance(change, LoraFactors)}
    seen: set[str] = set()
    for change in adapter.modules:
        if isinstance(change, BlockFactors):
            dense: DenseChange | None = None
            if change.depends_on_weight:
                if change.module_name not in weights:
                    gathered.problems.append(_no_weight(change, gathered.base))
                    continue
                dense = scaled_change(BatChange(change.block, *weights[change.module_name]), part.scale)
            shape = fitted[change.module_name].target.shape
            yield block_module(change, (shape[0], shape[1]), dense, part.scale if dense is None else 1.0)
        elif isinstance(change, ParameterFactors):
            if residual is not None:
                gathered.problems.append(_no_difference(change))
                continue
            try:
                yield parameter_module(change, fitted.get(_name(change)), part.scale)
            except CordaConvertError as problem:
                gathered.problems.append(problem)
        elif isinstance(change, LoraFactors) and _key(change) not in seen:
            key = _key(change)
            seen.add(key)
            outer = key.removesuffix(OUT_PROJ)
            summands = [Summand(change.lora_A, change.lora_B, 1.0)]
            if change.initial_lora_A is not None and change.initial_lora_B is not None:
                summands.append(Summand(change.initial_lora_A, change.initial_lora_B, -1.0))
            lost = None
            if residual is not None and change.module_name not in adapter.bases:
                if change.module_name not in weights:
                    gathered.problems.append(_no_weight(change, gathered.base))
                    continue
                lost = _lost(change, weights, residual, gathered)
            yield LoraModule(
                key=key,
                pattern_name=outer if outer in keys else key,
                summands=tuple(summands),
                scaling=change.scaling * part.scale,
                dense=lost,
                dense_rank=change.rank if lost is not None else 0,
                is_embedding=change.is_embedding,
                kernel=change.kernel,
            )


def _name(change: ParameterChange) -> str:
    """What tells a change of an adapter from its others: of a parameter, its wrapper's path."""
    return change.key if isinstance(change, ParameterFactors) else change.module_name


def _no_difference(change: ParameterFactors) -> CordaConvertError:
    return UnsupportedInput(
        f"{change.module_name}: initial factors of a parameter are not taken from the difference of two models.",
        next_step="Give the initial adapter of the training with --init, or merge into the residual.",
    )


def _key(change: LoraFactors) -> str:
    """The module's path in the file's keys, which for the output projection of a MultiheadAttention is not its name."""
    return strip_key(change.lora_A.name).removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")


def _lost(change: LoraFactors, weights: Matrices, residual: Residual, gathered: Gathered) -> Difference:
    """`W_res − W`, which is `−s·B₀A₀` up to the residual's rounding."""
    weight, layout = weights[change.module_name]
    own = residual.tensor(weight.name)
    if own.shape != weight.shape:
        gathered.problems.append(
            AdapterMismatch(
                f"{weight.name} is {own.shape} in {residual.name}, {weight.shape} in the base.",
                why="It is not the residual of this model.",
            )
        )
    return Difference(own, weight, layout)


def _no_weight(change: ParameterChange, base: Checkpoint | None) -> CordaConvertError:
    name = "the base" if base is None else base.name
    return UnsupportedInput(
        f"{change.module_name}: its weight does not lie in {name} as one matrix, from which its change could be computed.",
        next_step="Merge the adapter instead.",
    )


def _carried(adapter: Adapter) -> Iterable[Carried]:
    """modules_to_save, saved embeddings, trained biases, and token rows."""
    refs = [*adapter.replacements.values(), *adapter.bases.values()]
    refs += [change.rows for change in adapter.modules if isinstance(change, TokenRows)]
    for ref in refs:
        yield Carried(f"{PEFT_PREFIX}{strip_key(ref.name)}", ref)
