"""Which adapters are meant to be merged, and whether they can be."""

from collections.abc import Mapping

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapted.together import Named, as_active, check_together
from peftc.runtime.regions.modules import is_moved


def mergeable(state: AdapterSet, names: Named | None) -> Active:
    """The active adapters, or those named, if they can be merged now. Raises UsageError."""
    if state.base.is_merged:
        fail(UsageError, "E516", "the model is merged already", help="call unmerge_adapter first")
    active = meant(state, names)
    if not state.names():
        fail(UsageError, "E525", "there is no adapter, so there is nothing to merge", help="add or load one first")
    if not active and names is not None:
        fail(UsageError, "E517", "no adapter is named, so there is nothing to merge", help="name some, or leave it out")
    if not active:
        fail(UsageError, "E517", "no adapter is active, so there is nothing to merge", help="call set_adapter first")
    check_mergeable(state, active)
    return active


def beside(state: AdapterSet, names: Named | None, merged: Active) -> Active:
    """The active adapters, or those named, that are not merged yet. Raises UsageError where they cannot be, too."""
    wanted, there = meant(state, names), dict(merged)
    for name, weight in wanted if isinstance(names, Mapping) else ():
        if name in there and there[name] != weight:
            message = f"adapter {name!r} is merged already, with weight {there[name]:g} and not {weight:g}"
            fail(UsageError, "E516", message, help="call unmerge_adapter first")
    more = tuple(each for each in wanted if each[0] not in there)
    check_mergeable(state, more, others=merged)
    return more


def meant(state: AdapterSet, names: Named | None) -> Active:
    """The active adapters, or those named: with the weights that are said, or that they are active with, or one.

    Raises UsageError for an unknown name, and for one that is there twice.
    """
    if names is None:
        return state.active
    wanted = as_active(names, dict(state.active))
    for position, (name, _) in enumerate(wanted):
        state.adapter(name)
        if name in dict(wanted[:position]):
            fail(UsageError, "E512", f"adapter {name!r} is named twice", help="name it once, with one weight")
    return wanted


def check_mergeable(state: AdapterSet, active: Active, others: Active = ()) -> None:
    """Raise UsageError where these cannot be merged, beside `others` that are: a route weighs one of them, a layer was
    moved, one changes no weight, or they cannot be active together with these weights.
    """
    state.inputs.check_fixed([name for name, _ in active], "a weight")
    for name, _ in active:
        for at in state.adapter(name).plan.sites:
            if is_moved(state.base.model, state.host, at.site.user):
                message = f"{at.site.user}, which adapter {name!r} adapts, was moved or taken out of the model"
                help = "merge before layers are moved, or put them back"
                fail(UsageError, "E585", message, help=help)
        if any(at.bound.tasks for at in state.adapter(name).plan.sites):
            message = f"adapter {name!r} has other weights for every task: there are none to merge for all"
            fail(UsageError, "E522", message, help="serve the model with its adapters, and give 'task_ids' in calls")
        if changes_no_weight(state, name):
            message = f"adapter {name!r} changes no weight: what it puts in front cannot be merged"
            help = "merge the others by name, or serve the model with its adapters"
            fail(UsageError, "E522", message, help=help)
    together = (*others, *active)
    check_together(together, [state.adapter(name) for name, _ in together])


def changes_no_weight(state: AdapterSet, name: str) -> bool:
    """Whether all that an adapter does is to put something in front."""
    return any(at.bound.prompt is not None for at in state.adapter(name).plan.sites)
