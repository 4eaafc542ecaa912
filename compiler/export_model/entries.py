"""The calls that a program is made for: a plain forward, or for generation a prefill and the decoding after it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from peftc.compiler.export_model.export_options import Entry
from peftc.compiler.trace.example_inputs import example_inputs
from peftc.compiler.trace.samples import SIZES
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.export.lift import Dimension
from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.inputs import BATCH, PAST, CacheSlot, InputSpec, Size, inputs_of
from peftc.passes.ir.roles import Role, Stack
from peftc.passes.virtual_tokens.insert_prefix import CARRIED
from peftc.runtime.execution import nest
from peftc.runtime.execution.caches import Layout, cache_in
from peftc.runtime.execution.call import Call, tensor_names
from peftc.runtime.execution.call_routing import positions_of
from peftc.runtime.execution.program import guard_of
from peftc.runtime.model.model import AdaptedModel

FORWARD, PREFILL, DECODE, GENERATE = "forward", "prefill", "decode", "generate"
_TRIED = 4096


@dataclass(frozen=True)
class EntryCall:
    """A call that becomes a program: the names it is entered by, the name of its file, the call, and its options.

    `options` are the arguments that are no input of the program; `cache` is what the model calls the one that it is
    given, if it is.
    """

    names: tuple[str, ...]
    file: str
    call: Call
    options: Mapping[str, Any]
    cache: str | None = None

    @property
    def starts(self) -> bool:
        """Whether there is nothing behind a text that it is called with, whatever cache the model is given."""
        return DECODE not in self.names

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is called with to do what the program does with these inputs, and nothing in the cache."""
        empty = {} if self.cache is None else {self.cache: DynamicCache()}
        return {**inputs, **self.options, **empty}


def entered(adapted: AdaptedModel, entry: Entry, inputs: Mapping[str, Any] | None) -> tuple[EntryCall, ...]:
    """The calls that an artifact is made of. The model is to be in evaluation mode.

    Raises UsageError where it is not known how the model is called, or the model generates nothing.
    """
    if entry == GENERATE:
        return _generating(adapted)
    engine = adapted._adapter_state.engine
    given = inputs or _samples(adapted)
    options = {name: value for name, value in given.items() if not isinstance(value, torch.Tensor)}
    options |= engine.forward.only({contract.USE_CACHE: False})
    return (EntryCall((FORWARD,), FORWARD, engine.call("", {**given, **options}), options),)


def can_generate(adapted: AdaptedModel) -> bool:
    """Whether the model generates text with a cache that graphs take."""
    if not isinstance(adapted, PreTrainedModel) or not adapted.can_generate():
        return False
    engine = adapted._adapter_state.engine
    return engine.forward.cache is not None and engine.takes_cache(engine.plain_call("", _samples(adapted)))


def program_inputs(graph: fx.Graph) -> tuple[InputSpec, ...]:
    """The inputs of a specialised graph. An axis that nobody knows the meaning of keeps the size it was traced with."""
    specs = inputs_of(graph)
    has_past = any((PAST,) in spec.axes for spec in specs.values())
    found = []
    for node, spec in specs.items():
        shape = node.meta["val"].shape
        sizes = [_hint(shape[axis]) if size is None else size for axis, size in enumerate(spec.axes)]
        found.append(replace(spec, axes=tuple(sizes if has_past else map(_without_past, sizes))))
    return tuple(found)


def rows_of(graph: fx.Graph) -> int:
    """The batch that a graph was traced with."""
    first = next(iter(graph.find_nodes(op="placeholder"))).meta["val"].shape
    return _hint(first[0]) if first else SIZES[BATCH]


def dimensions(
    inputs: tuple[InputSpec, ...], rows: int, *, max_batch_size: int | None, max_length: int | None
) -> tuple[Dimension, ...]:
    """The dimensions of these inputs, each with its range. `rows` is the batch that the model was traced with."""
    sums = [size for spec in inputs for size in spec.axes if isinstance(size, tuple)]
    used = dict.fromkeys(name for each in sums for name in each if isinstance(name, str))
    found = []
    for name in used:
        low = 0 if name == PAST else 1
        sample, high = (rows, max_batch_size) if name == BATCH else (SIZES[name], max_length)
        found.append(Dimension(name, sample, low, high))
    return tuple(found)


def narrowed(
    found: tuple[Dimension, ...], inputs: tuple[InputSpec, ...], guards: tuple[str, ...]
) -> tuple[Dimension, ...]:
    """The dimensions with the ranges in which the trace holds: a module may take another way for other sizes.

    Only the batch varies in programs of modules that nothing is known of; the sizes around the sample are tried.
    """
    holds = guard_of(guards)
    if holds is None or not found:
        return found
    (batch,) = found

    def fits(rows: int) -> bool:
        return holds([tuple(size if isinstance(size, int) else rows for size in spec.axes) for spec in inputs])

    low = next((rows + 1 for rows in range(batch.sample - 1, 0, -1) if not fits(rows)), 1)
    larger = [*range(batch.sample + 1, _TRIED), *(2**power for power in range(_TRIED.bit_length(), 31))]
    high = next((rows - 1 for rows in larger if not fits(rows)), None)
    limits = [each for each in (high, batch.high) if each is not None]
    return (replace(batch, low=low, high=min(limits, default=None)),)


def length_of(adapted: AdaptedModel) -> int | None:
    """How many tokens a text may have: as many as the model has positions for, if they are counted."""
    config: object = getattr(adapted, "config", None)
    if config is None:
        return None
    lengths = (positions_of(adapted), contract.most_positions(config))
    return min((length for length in lengths if length is not None and length > 1), default=None)


def output_names(form: nest.Form, layout: Layout | None, cached: int, carried: int) -> list[str]:
    """The names of what a graph returns: its tensors, what goes into the cache, what virtual tokens leave there."""
    names = [_named(path) for path in tensor_names(form, "")]
    if layout is not None:
        names += [f"present_{each}" for each in cache_names(layout, cached)]
        names += [CARRIED + each for each in cache_names(layout, carried)]
    return names


def cache_names(layout: Layout, count: int) -> list[str]:
    """The names of a cache's tensors as far as a graph returns them: `0_key`, `0_value`, ... `cross_0_key`, ..."""
    stacks = ((False, layout.own), (True, layout.cross))
    slots = [
        CacheSlot(layer, part, is_cross)
        for is_cross, layers in stacks
        for layer in range(len(layers))
        for part in ("key", "value")
    ]
    return [str(slot) for slot in slots[:count]]


def _generating(adapted: AdaptedModel) -> tuple[EntryCall, ...]:
    if not can_generate(adapted):
        message = f"{adapted.base_class.__name__} generates nothing with a cache"
        fail(UsageError, "E641", message, help="export the plain forward: entry='forward', or --entry forward")
    engine = adapted._adapter_state.engine
    double = contract.is_encoder_decoder(adapted.config)
    stack = Stack.DECODER if double else Stack.ONLY
    ids, mask, places = (contract.name_of(role, stack) for role in (Role.TOKENS, Role.MASK, Role.POSITIONS))
    options: dict[str, Any] = engine.forward.only({contract.USE_CACHE: True, contract.LOGITS_TO_KEEP: 1})
    first: dict[str, Any] = dict(_samples(adapted))
    tokens = first[ids]
    takes_positions = engine.forward.takes(places) and not double
    if takes_positions:
        first[places] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    name = engine.forward.cache
    assert name is not None
    given = None if double else name
    with torch.no_grad():
        made = adapted(**first, **options, **({} if given is None else {given: DynamicCache()}))
    then: dict[str, Any] = {name: cache_in(made)}
    if double:
        then |= {contract.MASK: first.get(contract.MASK), ids: tokens[:, :1], **encoded_by(made)}
    else:
        then |= {ids: tokens, mask: torch.ones_like(tokens).repeat(1, 2)}
        then |= {places: first[places]} if takes_positions else {}
    decode = engine.call("", {**options, **engine.forward.only(then)})
    prefill = engine.call("", {**first, **options, **({} if given is None else {given: DynamicCache()})})
    # A call with an empty cache has the graph that goes on from one, unless prompts are put in front.
    if prefill.signature == decode.signature:
        return (EntryCall((PREFILL, DECODE), GENERATE, prefill, options, given),)
    return (
        EntryCall((PREFILL,), PREFILL, prefill, options, given),
        EntryCall((DECODE,), DECODE, decode, options, given),
    )


def encoded_by(output: Any) -> dict[str, Any]:
    """The argument by which a decoder goes on from what the encoder made in an earlier call."""
    return {contract.ENCODER_OUTPUT: BaseModelOutput(getattr(output, contract.ENCODED))}


def _samples(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    found = example_inputs(adapted)
    if found is None:
        message = f"it is not known how {adapted.base_class.__name__} is called"
        fail(UsageError, "E642", message, help="pass example_inputs, a mapping of named arguments")
    return found


def _without_past(size: Size) -> Size:
    """Without a cache nothing is behind."""
    return tuple(each for each in size if each != PAST) if isinstance(size, tuple) else size


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _named(path: str) -> str:
    name = path.strip(".").replace(".", "_")
    return f"output_{name}".rstrip("_") if not name or name.isdecimal() else name
