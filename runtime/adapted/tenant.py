"""What calls are served with while adapters are active: where graphs find what they read of these."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import fx

from peftc.passes.ir.emit import fake_like
from peftc.passes.plan.plan import IDS, ORDER, ROWS, ParamKey
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.adapters.slots import sources
from peftc.runtime.execution.engine import ActiveAdapters, Specialisation
from peftc.runtime.execution.virtual import Owner, Virtual


def tenant_of(specialisation: Specialisation, active: Active, adapters: Sequence[AdapterParameters]) -> ActiveAdapters:
    """What serves calls of these adapters, whose structure it is of, active in this order."""
    weighed = [(adapter, weight) for adapter, (_, weight) in zip(adapters, active, strict=True)]

    def lookup(position: int, site: str, role: str) -> torch.Tensor:
        adapter = adapters[position]
        return adapter.at_site(site)[role]

    def slot_value(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
        if role in (ROWS, IDS, ORDER):
            own = adapters[position].tensor(ParamKey(adapters[position].plan.name, site, role))
            return fake_like(own.shape, own.dtype, near)
        tensors = adapters[position].at_site(site)
        if role in tensors:
            return fake_like(tensors[role].shape, tensors[role].dtype, near)
        kinds = [each.dtype for each in tensors.values() if each.is_floating_point()]
        return fake_like((), kinds[0] if kinds else torch.float32, near)

    return ActiveAdapters(
        specialisation,
        slot_value,
        lookup,
        penalties=tuple(each.penalty for each in adapters if each.allocator is not None),
        virtual=Virtual(specialisation.structure.fronts, owner=Owner(active, adapters)),
        sources=cache(lambda: sources(weighed)),
        holders=cache(lambda: [each for adapter in adapters for each in adapter.modules()]),
    )
