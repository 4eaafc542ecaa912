"""Adapters whose budget is dealt out while training."""

import torch

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapters.bank import AdapterParameters


def update_and_allocate(state: AdapterSet, step: int) -> None:
    """Follow a training step of the active adapters that keep a budget: see `AdaptedModel.update_and_allocate`."""
    if state.displaced:
        message = "the adapters are merged, and training them would change nothing"
        fail(UsageError, "E549", message, help="call unmerge_adapter first")
    for adapter in allocating(state):
        assert adapter.allocator is not None
        adapter.allocator.update(adapter.tensor, step)


def regularization_loss(state: AdapterSet) -> torch.Tensor:
    """The regulariser of the active adapters, zero where their methods have none."""
    total = torch.zeros(())
    for name, _ in state.active:
        penalty = state.adapter(name).penalty()
        total = total if penalty is None else total.to(penalty) + penalty
    return total


def allocating(state: AdapterSet) -> list[AdapterParameters]:
    """The active trainable adapters that keep a budget. Raises UsageError if there is none."""
    active = [state.adapter(name) for name, _ in state.active]
    found = [each for each in active if each.allocator is not None and each.is_trainable]
    if not found:
        names = ", ".join(f"{each.plan.name!r} ({each.plan.spec.rule.name})" for each in active) or "none"
        message = "no active adapter that is trained keeps a budget of ranks"
        help = f"active: {names}; its method needs an 'allocate' item, and load needs is_trainable=True"
        fail(UsageError, "E546", message, help=help)
    return found
