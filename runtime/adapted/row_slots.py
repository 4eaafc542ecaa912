"""What slots have, as far as a trace looks at it, where rows have adapters of their own."""

from collections.abc import Sequence

import torch
from torch import fx

from peftc.passes.insert.insert_delta import SlotValue
from peftc.passes.ir.emit import fake_like
from peftc.passes.plan.by_row import ByRow
from peftc.passes.plan.plan import IDS, ORDER, ROWS, ParamKey
from peftc.passes.plan.structure import rows_slot, site_slot
from peftc.runtime.mixed_batch.batch import Chosen


def slot_values(shared: ByRow, chosen: Sequence[Chosen]) -> SlotValue:
    """The fake values of what slots have, as of one of these choices."""
    like = _like(shared, chosen)

    def slot_value(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
        if role in (ROWS, IDS, ORDER):
            return fake_like(*like[rows_slot(position, site)][role], near)
        tensors = like[site_slot(position, site)]
        if role in tensors:
            return fake_like(*tensors[role], near)
        kinds = [dtype for _, dtype in tensors.values() if dtype.is_floating_point]
        return fake_like((), kinds[0] if kinds else torch.float32, near)

    return slot_value


def _like(shared: ByRow, chosen: Sequence[Chosen]) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """The sizes and types of what slots have, by role: of one choice that has the slot, which may be gone later."""
    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for owners, each in zip(shared.owners, chosen, strict=True):
        own = {slot: shared_slot for shared_slot, slot in owners.items()}
        for place, (adapter, _) in enumerate(each.weighed):
            name, plan = adapter.plan.name, adapter.plan
            for at in plan.sites:
                tensors = {role: (tensor.shape, tensor.dtype) for role, tensor in adapter.at_site(at.site.name).items()}
                found.setdefault(own[site_slot(place, at.site.name)], tensors)
            for rows in plan.rows:
                trained = {role: adapter.tensor(ParamKey(name, rows.module, role)) for role in (ROWS, IDS, ORDER)}
                kinds = {role: (tensor.shape, tensor.dtype) for role, tensor in trained.items()}
                found.setdefault(own[rows_slot(place, rows.module)], kinds)
    return found
