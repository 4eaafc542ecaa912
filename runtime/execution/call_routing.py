"""Which call a graph with virtual tokens takes for a call of the user's."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError, UsageError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.foreign.peft import TASK_IDS
from peftc.passes.ir.roles import Role
from peftc.passes.virtual_tokens.insert_heads import POSITIONS
from peftc.runtime.execution import caches, virtual
from peftc.runtime.execution.call import Call
from peftc.runtime.execution.virtual import Virtual


class Runner(Protocol):
    """What widening needs of an engine."""

    def plain_call(self, entry: str, arguments: Mapping[str, Any]) -> Call:
        """A call taken apart, without virtual tokens."""
        ...

    def takes_cache(self, call: Call) -> bool:
        """Whether the model can be given keys and values that attention sees beside the call's own."""
        ...

    def run(self, entry: str, arguments: Mapping[str, Any]) -> Any:
        """Call the model."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model."""
        ...

    @property
    def positions(self) -> int | None:
        """How many tokens the model has learned positions for."""
        ...

    @property
    def forward(self) -> contract.Forward:
        """What the model's forward takes."""
        ...


def widened(engine: Runner, front: Virtual, entry: str, arguments: Mapping[str, Any]) -> Call:
    """The call as a graph with these virtual tokens takes it. Raises UsageError."""
    tasks = virtual.tasks_of(arguments.get(TASK_IDS), front.tasks)
    arguments = {name: each for name, each in arguments.items() if name != TASK_IDS}
    if front.compatible:
        arguments.pop(contract.name_of(Role.POSITIONS), None)  # as PEFT
    if any(each.labels is not None for each in front.fronts):
        arguments = virtual.labelled(arguments)
    call = engine.plain_call(entry, arguments)
    encoder_decoder = contract.is_encoder_decoder(getattr(engine.model, "config", None))
    if front.of("cache"):
        return _prefixed(engine, front, call, entry, encoder_decoder)
    if front.of("prompt"):
        return _prompted(engine, front, call, arguments, tasks, encoder_decoder)
    return call


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model has learned positions for, where they are a table; one row may be the padding's."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and f"{name}.weight".endswith(POSITIONS):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _check_positions(engine: Runner, front: Virtual, call: Call) -> None:
    """Raise ModelError where a text with the prefix before it is longer than the model has positions."""
    tokens = call.text
    if engine.positions is None or tokens is None or call.tensor(Role.POSITIONS) is not None:
        return
    length, size = sum(each.length for each in front.of("cache")), tokens.shape[1]
    if length + size > engine.positions:
        message = f"a prefix of {length} before {size} tokens: the model has positions for {engine.positions}"
        fail(ModelError, "E423", message, help="give a shorter text, or a shorter prefix")


def _prefixed(engine: Runner, front: Virtual, call: Call, entry: str, encoder_decoder: bool) -> Call:
    if encoder_decoder and entry:
        return call  # an encoder: prefixes are the decoder's
    if call.cache is not None:
        return virtual.with_extra(call, virtual.PREFIX)
    if engine.takes_cache(call):
        assert engine.forward.cache is not None
        return virtual.with_extra(virtual.with_empty_cache(call, engine.forward.cache, encoder_decoder), virtual.PREFIX)
    _check_positions(engine, front, call)
    return virtual.with_extra(call, virtual.HEADS)


def _prompted(
    engine: Runner,
    front: Virtual,
    call: Call,
    arguments: Mapping[str, Any],
    tasks: torch.Tensor | None,
    encoder_decoder: bool,
) -> Call:
    extra: tuple[torch.Tensor, ...] = () if tasks is None else (_rows(tasks, call),)
    if encoder_decoder:
        given = () if call.text is None else extra
        return virtual.with_extra(call, virtual.START, given)
    if engine.forward.takes(contract.name_of(Role.POSITIONS)) and not front.compatible and engine.takes_cache(call):
        call = virtual.with_positions(call)
    if call.cache is None or not call.cache.get_seq_length():
        return virtual.with_extra(call, virtual.START, extra, front.owner)
    carried = virtual.carried_by(call.cache, front.owner, call.rows)
    if carried is None:
        # The cache began without these virtual tokens: what they would have left in it does not depend on the text.
        first = virtual.first_token(arguments) | ({} if tasks is None else {TASK_IDS: tasks})
        made = caches.cache_in(engine.run("", first))
        assert made is not None
        carried = virtual.carried_by(made, front.owner, call.rows)
        assert carried is not None
        virtual.carry(call.cache, front.owner, carried)
    return virtual.with_extra(call, virtual.CARRY, carried)


def _rows(tasks: torch.Tensor, call: Call) -> torch.Tensor:
    """The tasks, one for each row of the call."""
    rows, device = call.rows, call.tensors[0].device
    if len(tasks) not in (1, rows):
        message = f"{len(tasks)} tasks were given for {rows} rows"
        fail(UsageError, "E563", message, help="give one for each row, or one for all", where=TASK_IDS)
    return tasks.to(device, torch.int64).expand(rows)
