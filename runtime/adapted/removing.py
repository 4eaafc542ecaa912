"""Removing adapters, and which is active then."""

import warnings
from collections.abc import Sequence

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.adapted.adapter_set import AdapterSet


def remove(state: AdapterSet, names: Sequence[str]) -> None:
    """Take adapters away, all or on an error none: see `AdaptedModel.delete_adapter`."""
    for name in names:
        state.adapter(name)
    merged = [name for name, _ in state.base.merged_adapters if name in names]
    if merged:
        message = f"adapter {merged[0]!r} cannot be deleted while it is merged"
        fail(UsageError, "E515", message, help="call unmerge_adapter first")
    routed = () if state.routed is None else state.routed.names
    for name in names:
        if name in routed:
            message = f"adapter {name!r} cannot be deleted while a route chooses from it"
            fail(UsageError, "E536", message, help="take the route away first: set_route(None)")
    had_active = bool(state.active)
    trained = any(state.adapter(name).is_trainable for name, _ in state.active)
    for name in dict.fromkeys(names):
        state.remove(name)
    left = sorted(state.names())
    if had_active and not state.active and left:
        warnings.warn(f"what was active is deleted: {left[0]!r} is active now", stacklevel=3)
        if trained and not state.adapter(left[0]).frozen:
            state.adapter(left[0]).train_only(True)
        state.activate(((left[0], 1.0),))
