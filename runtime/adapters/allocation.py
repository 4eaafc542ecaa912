"""A budget of entries, kept while training: which entries matter, how many may stay, and masks for the others.

An entry is one number of a vector (a singular value, say) with its parts in other tensors. Its importance is the
product of two smoothed measures of |weight * gradient|, its size and how much that varies, averaged over each part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftc.grammar.diagnostics import SpecError, UsageError, fail
from peftc.grammar.method.rule import Schedule
from peftc.passes.plan.plan import AdapterPlan, ParamKey

Find = Callable[[ParamKey], Tensor]
_MASK, _PRESENT, _SIZE, _CHANGE = "mask", "present", "sensitivity", "uncertainty"


@dataclass(frozen=True)
class Budgeted:
    """The tensors of a site that share entries, each with the axis that counts them; the vector is the first."""

    parts: tuple[tuple[ParamKey, int], ...]
    count: int
    target: int

    @property
    def vector(self) -> ParamKey:
        """The tensor whose numbers are masked."""
        return self.parts[0][0]


def budgeted(plan: AdapterPlan) -> tuple[Budgeted, ...]:
    """What an adapter's sites keep a budget of, in order."""
    found = []
    for at in plan.sites:
        if at.bound.allocation is not None:
            params = {each.role: each for each in at.bound.params}
            axes = at.bound.allocation.axes
            parts = tuple((at.key(plan.name, params[role]), axis) for role, axis in axes)
            count = params[axes[0][0]].shape[axes[0][1]]
            found.append(Budgeted(parts, count, at.bound.allocation.target))
    return tuple(found)


def budget_at(schedule: Schedule, step: int, start: int, goal: int) -> tuple[int, bool]:
    """How many entries may stay after a step, and whether it is one at which entries are dropped.

    From `start` the budget falls to `goal` as the cube of the steps that are left before the final ones.
    """
    last = schedule.steps - schedule.final
    if step <= schedule.warmup:
        return start, False
    if step >= last:
        return goal, True
    left = 1 - (step - schedule.warmup) / (last - schedule.warmup)
    return int((start - goal) * left**3 + goal), step % schedule.every == 0


class Allocator(nn.Module):
    """Deals a budget out over the sites of one adapter. Masks and measures are buffers: a state dict has them."""

    def __init__(self, plan: AdapterPlan):
        super().__init__()
        self.groups = budgeted(plan)
        self.name = plan.name
        schedules = {at.bound.allocation.schedule for at in plan.sites if at.bound.allocation is not None}
        if len(schedules) > 1:
            message = f"the budget of adapter {plan.name!r} falls by one schedule, and its sites have several"
            fail(SpecError, "E219", message, plan.spec.span, help="only the target can differ between sites")
        (self.schedule,) = schedules

    @property
    def last(self) -> int:
        """The step at which the masks become final."""
        return self.schedule.steps - self.schedule.final

    @property
    def masks(self) -> dict[ParamKey, Tensor]:
        """Which entries of each vector are kept; empty before any was dropped."""
        found = {each.vector: self._buffers.get(_name(_MASK, each.vector)) for each in self.groups}
        return {key: mask for key, mask in found.items() if mask is not None}

    def restore(self, masks: Mapping[ParamKey, Sequence[bool]], find: Find) -> None:
        """Take the masks of a checkpoint over, in which what was dropped is no more."""
        for key, kept in masks.items():
            mask = torch.tensor(kept, dtype=torch.bool, device=find(key).device)
            self.register_buffer(_name(_MASK, key), mask)
            self.register_buffer(_name(_PRESENT, key), mask.clone())

    # --- training ---

    @torch.no_grad()
    def update(self, find: Find, step: int) -> None:
        """Follow a step of the optimiser, while the parameters have their gradients still. Raises UsageError."""
        if self.schedule.steps <= 0:
            message = f"the budget of adapter {self.name!r} falls over a number of steps that was not said"
            help = "say the number of training steps: total_step in PEFT's config, or as the method calls it"
            fail(UsageError, "E547", message, help=help)
        if step < self.last:
            self._measure(find)
        start, goal = sum(each.count for each in self.groups), sum(each.target for each in self.groups)
        budget, due = budget_at(self.schedule, step, start, goal)
        if due and step <= self.last and self._measured():
            self._choose(start - budget)
        if due:
            self._apply_masks(find)
        if step >= self.last:
            self._forget()

    def penalty(self, find: Find) -> Tensor:
        """The regulariser: how far the entries' parts are from orthonormal, on average over the tensors."""
        terms = []
        for group in self.groups:
            present = self._buffers.get(_name(_PRESENT, group.vector))
            for key, axis in group.parts[1:]:
                rows = find(key).movedim(axis, 0).flatten(1)
                wanted = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
                wanted = wanted if present is None else wanted * present.to(rows.device)
                terms.append(torch.linalg.matrix_norm(rows @ rows.T - wanted))
        device = terms[0].device
        return self.schedule.orthogonal * sum(each.to(device) for each in terms) / len(terms)

    def _measure(self, find: Find) -> None:
        smooth, spread = self.schedule.sensitivity, self.schedule.uncertainty
        for key, _ in self._parts():
            tensor = find(key)
            if tensor.grad is None:
                message = f"'{key.role}' of {key.site} has no gradient to judge its importance by"
                help = "call update_and_allocate after the optimiser's step and before zero_grad"
                fail(UsageError, "E548", message, help=help)
            # A step that overflowed and was skipped must not spoil the averages for ever.
            now = torch.nan_to_num((tensor * tensor.grad).abs(), nan=0.0, posinf=0.0)
            now = now.to(torch.promote_types(now.dtype, torch.float32))
            size, change = (self._measure_of(kind, key, now) for kind in (_SIZE, _CHANGE))
            size.copy_(smooth * size + (1 - smooth) * now)
            change.copy_(spread * change + (1 - spread) * (now - size).abs())

    def _measure_of(self, kind: str, key: ParamKey, like: Tensor) -> Tensor:
        name = _name(kind, key)
        before = self._buffers.get(name)
        if before is None or before.device != like.device:
            self.register_buffer(name, torch.zeros_like(like) if before is None else before.to(like.device))
        return self.get_buffer(name)

    def _measured(self) -> bool:
        return all(_name(_CHANGE, key) in self._buffers for key, _ in self._parts())

    def _choose(self, dropped: int) -> None:
        """Masks that drop the least important entries of all sites together, and those that tie with the last."""
        scores = [self._scores(each) for each in self.groups]
        device = scores[0].device
        together = torch.cat([each.to(device) for each in scores])
        edge = torch.kthvalue(together, dropped).values if dropped > 0 else None
        for group, score in zip(self.groups, scores, strict=True):
            mask = torch.ones_like(score, dtype=torch.bool) if edge is None else score > edge.to(score.device)
            self.register_buffer(_name(_MASK, group.vector), mask)

    def _scores(self, group: Budgeted) -> Tensor:
        found = []
        for key, axis in group.parts:
            whole = self.get_buffer(_name(_SIZE, key)) * self.get_buffer(_name(_CHANGE, key))
            found.append(whole.movedim(axis, 0).flatten(1).mean(1))
        return found[0] + torch.stack([each.to(found[0].device) for each in found[1:]]).sum(0)

    def _apply_masks(self, find: Find) -> None:
        for group in self.groups:
            mask = self._buffers.get(_name(_MASK, group.vector))
            if mask is not None:
                vector = find(group.vector)
                vector.masked_fill_(~mask.to(vector.device).view(_along(vector, group.parts[0][1])), 0.0)

    def _forget(self) -> None:
        for name in [name for name in self._buffers if name.startswith((_SIZE, _CHANGE))]:
            del self._buffers[name]

    def _parts(self) -> Iterator[tuple[ParamKey, int]]:
        return (part for group in self.groups for part in group.parts)

    # --- saving ---

    def pruned(self, key: ParamKey, tensor: Tensor) -> Tensor:
        """What is saved of a tensor: the parts of the entries that are kept."""
        for group in self.groups:
            mask = self._buffers.get(_name(_MASK, group.vector))
            axis = dict(group.parts).get(key)
            if mask is not None and axis is not None:
                return tensor.index_select(axis, mask.nonzero().flatten().to(tensor.device))
        return tensor

    def expect(self, state: Mapping[str, Tensor]) -> None:
        """Have just the buffers that a state has, which is about to be loaded."""
        for name in [name for name in self._buffers if name not in state]:
            del self._buffers[name]
        for name, value in state.items():
            if name not in self._buffers:
                self.register_buffer(name, torch.empty_like(value))


def expanded(tensor: Tensor, axis: int, kept: Sequence[bool]) -> Tensor:
    """A pruned tensor at its full size, with zeros for what was dropped."""
    sizes = list(tensor.shape)
    sizes[axis] = len(kept)
    places = torch.tensor(kept, dtype=torch.bool).nonzero().flatten().to(tensor.device)
    return tensor.new_zeros(sizes).index_copy(axis, places, tensor)


def _along(tensor: Tensor, axis: int) -> list[int]:
    return [-1 if each == axis else 1 for each in range(tensor.dim())]


def _name(kind: str, key: ParamKey) -> str:
    """A buffer's name, which cannot hold dots."""
    return f"{kind}/{key.role}/{key.site.replace('.', '/')}"
