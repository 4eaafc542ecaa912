"""Adapters whose budget is dealt out while training: the methods PEFT's users know."""

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.model.state import AdapterState
from peftc.runtime.peft_format.checkpoint import kept_masks


class Allocating(nn.Module):
    """The part of an adapted model that keeps budgets."""

    _adapter_state: AdapterState

    def update_and_allocate(self, global_step: int) -> None:
        """Follow a training step of the active adapters that keep a budget, as PEFT's method of that name.

        Importance is read off the parameters and their gradients, the budget follows the method's schedule, and what is
        over it is masked. To be called after `optimizer.step()` and before `optimizer.zero_grad()`, with steps counted
        from 0; with transformers' Trainer, `RankAllocation` calls it. Raises UsageError.
        """
        if self._adapter_state.merged:
            message = "the adapters are merged, and training them would change nothing"
            fail(UsageError, "E549", message, help="call unmerge_adapter first")
        for adapter in allocating(self._adapter_state):
            assert adapter.allocator is not None
            adapter.allocator.update(adapter.tensor, global_step)

    def rank_pattern(self, adapter_name: str) -> dict[str, list[bool]]:
        """Which entries of its budget an adapter keeps, by parameter, as PEFT's config field of that name.

        Empty before any was dropped. Raises UsageError for an unknown adapter.
        """
        adapter = self._adapter_state.adapter(adapter_name)
        return {} if adapter.allocator is None else kept_masks(adapter.plan, adapter.allocator.masks)

    def regularization_loss(self) -> torch.Tensor:
        """The regulariser of the active adapters, zero where their methods have none.

        In training mode it is part of the loss that the model returns; a loss made from logits has to add it.
        """
        state, total = self._adapter_state, torch.zeros(())
        for name, _ in state.active:
            penalty = state.adapter(name).penalty()
            total = total if penalty is None else total.to(penalty) + penalty
        return total


def allocating(state: AdapterState) -> list[AdapterParameters]:
    """The active trainable adapters that keep a budget. Raises UsageError if there is none."""
    active = [state.adapter(name) for name, _ in state.active]
    found = [each for each in active if each.allocator is not None and each.is_trainable]
    if not found:
        names = ", ".join(f"{each.plan.name!r} ({each.plan.spec.rule.name})" for each in active) or "none"
        message = "no active adapter that is trained keeps a budget of ranks"
        help = f"active: {names}; its method needs an 'allocate' item, and load needs is_trainable=True"
        fail(UsageError, "E546", message, help=help)
    return found
