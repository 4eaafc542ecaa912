"""The calls that a program is made for: a plain forward, or for generation a prefill and the decoding after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from peftc.compiler.export_model.export_options import Entry
from peftc.compiler.trace.example_inputs import example_inputs
from peftc.compiler.trace.samples import PAST, QUERY, ROWS, SOURCE
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.export.lift import Dimension, Given, Size
from peftc.passes.virtual_tokens.insert_prefix import CARRIED
from peftc.runtime.execution import nest
from peftc.runtime.execution.caches import Layout
from peftc.runtime.execution.call import Call, tensor_names
from peftc.runtime.execution.call_routing import positions_of
from peftc.runtime.execution.program import guard_of
from peftc.runtime.model.model import AdaptedModel

FORWARD, PREFILL, DECODE, GENERATE = "forward", "prefill", "decode", "generate"
BATCH, SEQUENCE, PAST_LENGTH, SOURCE_LENGTH = "batch", "sequence", "past", "source"
ENCODED = ("past_cross_", "encoder_outputs")  # the inputs that an encoder made

# What the sizes that a model is traced with stand for: see `peftc.compiler.trace.samples`.
_MEANINGS: Mapping[int, tuple[str, ...]] = {
    ROWS: (BATCH,),
    QUERY: (SEQUENCE,),
    PAST: (PAST_LENGTH,),
    SOURCE: (SOURCE_LENGTH,),
    PAST + QUERY: (PAST_LENGTH, SEQUENCE),
}
_TRIED = 4096
_SAMPLES = {SEQUENCE: QUERY, PAST_LENGTH: PAST, SOURCE_LENGTH: SOURCE}


@dataclass(frozen=True)
class EntryCall:
    """A call that becomes a program: the names it is entered by, the name of its file, the call, and its options.

    `options` are the arguments that are no input of the program.
    """

    names: tuple[str, ...]
    file: str
    call: Call
    options: Mapping[str, Any]

    @property
    def starts(self) -> bool:
        """Whether there is nothing behind a text that it is called with, whatever cache the model is given."""
        return DECODE not in self.names

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is called with to do what the program does with these inputs, and nothing in the cache."""
        empty = {"past_key_values": DynamicCache()} if "past_key_values" in self.options else {}
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
    options |= {"use_cache": False} if "use_cache" in engine.parameters else {}
    return (EntryCall((FORWARD,), FORWARD, engine.call("", {**given, **options}), options),)


def can_generate(adapted: AdaptedModel) -> bool:
    """Whether the model generates text with a cache that graphs take."""
    if not isinstance(adapted, PreTrainedModel) or not adapted.can_generate():
        return False
    engine = adapted._adapter_state.engine
    return "past_key_values" in engine.parameters and engine.takes_cache(engine.plain_call("", _samples(adapted)))


def given_inputs(graph: fx.Graph, is_known: bool, encoded: int = 0) -> tuple[Given, ...]:
    """The inputs of a specialised graph, their sizes by meaning; `is_known` for a model of transformers'.

    `encoded` are the virtual tokens that an encoder has in front: what it leaves to a decoder is so much longer.
    """
    nodes = list(graph.find_nodes(op="placeholder"))
    meanings = _MEANINGS if is_known else _rows_of([node.meta["val"].shape for node in nodes])
    found = []
    for node in nodes:
        value = node.meta["val"]
        sizes = tuple(_size(each, axis, meanings, is_known) for axis, each in enumerate(value.shape))
        if encoded and str(node.target).startswith(ENCODED):
            sizes = tuple((SOURCE_LENGTH, encoded) if each == (SOURCE_LENGTH,) else each for each in sizes)
        found.append(Given(str(node.target), sizes, value.dtype, value.device))
    if any((PAST_LENGTH,) in each.shape for each in found):
        return tuple(found)
    return tuple(replace(each, shape=tuple(map(_without_past, each.shape))) for each in found)


def encoded_prompts(adapted: AdaptedModel) -> int:
    """How many virtual tokens the active adapters put in front of what a model's encoder reads."""
    if not getattr(getattr(adapted, "config", None), "is_encoder_decoder", False):
        return 0
    return sum(each.length for each in adapted._adapter_state.engine.structure.fronts if each.site.kind == "prompt")


def rows_of(graph: fx.Graph) -> int:
    """The batch that a graph was traced with."""
    first = next(iter(graph.find_nodes(op="placeholder"))).meta["val"].shape
    return _hint(first[0]) if first else ROWS


def dimensions(
    given: tuple[Given, ...], rows: int, *, max_batch_size: int | None, max_length: int | None
) -> tuple[Dimension, ...]:
    """The dimensions of these inputs, each with its range. `rows` is the batch that the model was traced with."""
    sums = [size for each in given for size in each.shape if isinstance(size, tuple)]
    used = dict.fromkeys(name for each in sums for name in each if isinstance(name, str))
    found = []
    for name in used:
        low = 0 if name == PAST_LENGTH else 1
        sample, high = (rows, max_batch_size) if name == BATCH else (_SAMPLES[name], max_length)
        found.append(Dimension(name, sample, low, high))
    return tuple(found)


def narrowed(found: tuple[Dimension, ...], given: tuple[Given, ...], guards: tuple[str, ...]) -> tuple[Dimension, ...]:
    """The dimensions with the ranges in which the trace holds: a module may take another way for other sizes.

    Only the batch varies in programs of modules that nothing is known of; the sizes around the sample are tried.
    """
    holds = guard_of(guards)
    if holds is None or not found:
        return found
    (batch,) = found

    def fits(rows: int) -> bool:
        return holds([tuple(each if isinstance(each, int) else rows for each in own.shape) for own in given])

    low = next((rows + 1 for rows in range(batch.sample - 1, 0, -1) if not fits(rows)), 1)
    larger = [*range(batch.sample + 1, _TRIED), *(2**power for power in range(_TRIED.bit_length(), 31))]
    high = next((rows - 1 for rows in larger if not fits(rows)), None)
    limits = [each for each in (high, batch.high) if each is not None]
    return (replace(batch, low=low, high=min(limits, default=None)),)


def length_of(adapted: AdaptedModel) -> int | None:
    """How many tokens a text may have: as many as the model has positions for, if they are counted."""
    config: Any = getattr(adapted, "config", None)
    if config is None:
        return None
    learned = positions_of(adapted)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = getattr(text, "max_position_embeddings", None)
    known = [each for each in (learned, said) if isinstance(each, int) and each > 1]
    return min(known, default=None)


def output_names(form: nest.Form, layout: Layout | None, cached: int, carried: int) -> list[str]:
    """The names of what a graph returns: its tensors, what goes into the cache, what virtual tokens leave there."""
    names = [_named(path) for path in tensor_names(form, "")]
    if layout is not None:
        names += [f"present_{each}" for each in cache_names(layout, cached)]
        names += [CARRIED + each for each in cache_names(layout, carried)]
    return names


def cache_names(layout: Layout, count: int) -> list[str]:
    """The names of a cache's tensors as far as a graph returns them: `0_key`, `0_value`, ... `cross_0_key`, ..."""
    own = [f"{index}_{role}" for index in range(len(layout.own)) for role in ("key", "value")]
    cross = [f"cross_{index}_{role}" for index in range(len(layout.cross)) for role in ("key", "value")]
    return [*own, *cross][:count]


def _generating(adapted: AdaptedModel) -> tuple[EntryCall, ...]:
    if not can_generate(adapted):
        message = f"{adapted.base_class.__name__} generates nothing with a cache"
        fail(UsageError, "E641", message, help="export the plain forward: entry='forward', or --entry forward")
    engine = adapted._adapter_state.engine
    double = bool(getattr(adapted.config, "is_encoder_decoder", False))
    options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in engine.parameters}
    first: dict[str, Any] = dict(_samples(adapted))
    tokens = first["decoder_input_ids" if double else "input_ids"]
    takes_positions = "position_ids" in engine.parameters and not double
    if takes_positions:
        first["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if not double:
        options["past_key_values"] = DynamicCache()
    with torch.no_grad():
        made = adapted(**first, **options)
    then: dict[str, Any] = {"past_key_values": made.past_key_values, "attention_mask": first.get("attention_mask")}
    if double:
        then |= {"decoder_input_ids": tokens[:, :1]}
        then["encoder_outputs"] = BaseModelOutput(last_hidden_state=made.encoder_last_hidden_state)
    else:
        then |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens).repeat(1, 2)}
        if takes_positions:
            then["position_ids"] = first["position_ids"]
    then = {name: value for name, value in then.items() if name in engine.parameters}
    decode = engine.call("", {**options, **then})
    prefill = engine.call("", {**first, **options, **({} if double else {"past_key_values": DynamicCache()})})
    # A call with an empty cache has the graph that goes on from one, unless prompts are put in front.
    if prefill.signature == decode.signature:
        return (EntryCall((PREFILL, DECODE), GENERATE, prefill, options),)
    return EntryCall((PREFILL,), PREFILL, prefill, options), EntryCall((DECODE,), DECODE, decode, options)


def _samples(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    found = example_inputs(adapted)
    if found is None:
        message = f"it is not known how {adapted.base_class.__name__} is called"
        fail(UsageError, "E642", message, help="pass example_inputs, a mapping of named arguments")
    return found


def _without_past(size: Size) -> Size:
    """Without a cache nothing is behind."""
    return tuple(each for each in size if each != PAST_LENGTH) if isinstance(size, tuple) else size


def _rows_of(shapes: Sequence[torch.Size]) -> Mapping[int, tuple[str, ...]]:
    """The batch of a module nothing is known of: the first axis, if it varies and is of one size in every input."""
    first = {_hint(shape[0]) for shape in shapes if shape}
    varies = all(isinstance(shape[0], torch.SymInt) for shape in shapes if shape)
    return {next(iter(first)): (BATCH,)} if len(first) == 1 and varies else {}


def _size(size: int | torch.SymInt, axis: int, meanings: Mapping[int, tuple[str, ...]], is_known: bool) -> Size:
    if isinstance(size, int):
        return size
    return meanings.get(_hint(size), _hint(size)) if is_known or axis == 0 else _hint(size)


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _named(path: str) -> str:
    name = path.strip(".").replace(".", "_")
    return f"output_{name}".rstrip("_") if not name or name.isdecimal() else name
