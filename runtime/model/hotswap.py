"""A saved adapter in the place of one that is there."""

import warnings
from dataclasses import replace
from os import PathLike
from typing import Literal

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.adapters.room import largest_rank
from peftc.runtime.model.loading import load_adapter
from peftc.runtime.model.state_dicts import IncompatibleKeys, check_unmerged
from peftc.runtime.peft_format.load_options import LoadOptions


def swap_adapter(
    model: AdaptedModule, source: str | PathLike[str], name: str, options: LoadOptions
) -> IncompatibleKeys:
    """Put a saved adapter in the place of one, under its name, and active as it is.

    Ranks may differ. What is trained is trained on, and the model stays in training or in evaluation. Raises as
    `load_adapter`, UsageError if there is no such adapter, it is merged, or there is no room for the rank of the other,
    and leaves everything as it was.
    """
    state = model._adapter_state
    replaced = state.adapter(name)
    check_unmerged(model, name)
    trained, frozen = replaced.is_trainable, replaced.frozen
    count = len(state.names()) + 1
    trial = next(f"hotswap_{number}" for number in range(count) if f"hotswap_{number}" not in state.names())
    # As one to be trained, which leaves the model's mode alone.
    told = load_adapter(model, source, trial, replace(options, is_trainable=True))  # refused here, if it is
    made = state.adapter(trial).renamed(name)
    state.remove(trial)
    if state.room:
        _check_room(made, state.room)
    made.train_only(trained)
    made.frozen = frozen
    state.replace(name, made)
    return told


def make_room(model: AdaptedModule, target_rank: int, check_compiled: Literal["error", "warn", "ignore"]) -> None:
    """Let adapters of other ranks be swapped in without compiling anew: see `AdaptedModel.enable_peft_hotswap`."""
    state = model._adapter_state
    if check_compiled not in ("error", "warn", "ignore"):
        fail(UsageError, "E592", f"check_compiled is {check_compiled!r}", help="give 'error', 'warn' or 'ignore'")
    if target_rank < 1:
        fail(UsageError, "E592", f"target_rank is {target_rank}", help="give the largest rank that is to fit")
    for name in state.names():
        _check_room(state.adapter(name), target_rank)
    if state.host.compiled and check_compiled != "ignore":
        message = "the model is compiled already: what was compiled is compiled once more"
        if check_compiled == "error":
            fail(UsageError, "E574", message, help="call enable_peft_hotswap first, or with check_compiled='ignore'")
        warnings.warn(message, stacklevel=3)
    state.make_room(target_rank)


def _check_room(adapter: AdapterParameters, room: int) -> None:
    rank = largest_rank(adapter)
    if rank > room:
        message = f"adapter {adapter.plan.name!r} has a rank of {rank}, and there is room for {room}"
        fail(UsageError, "E592", message, help="give enable_peft_hotswap a larger target_rank")
