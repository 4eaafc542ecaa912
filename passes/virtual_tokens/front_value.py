"""What adapters put in front, as nodes: their prompts one after the other, for every row of a call."""

from collections.abc import Sequence

import torch
from torch import fx

from peftc.passes.expression.materialise import Evaluator, to_logical
from peftc.passes.insert.insert_delta import SlotValue
from peftc.passes.ir.emit import Emit
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import VirtualTokens, site_slot, slot_role

aten = torch.ops.aten


def front_value(
    emit: Emit, front: VirtualTokens, slot_value: SlotValue, near: fx.Node, weight: fx.Node | None
) -> Evaluator[fx.Node]:
    """The values of a front's expressions; `near` is a node on the device, `weight` the embeddings as stored."""
    slot, name = site_slot(front.term.position, front.site.name), front.site.name
    params: dict[str, fx.Node] = {}
    scalars: dict[str, fx.Node | float] = {}
    for role in front.term.roles:
        value = slot_value(front.term.position, name, role.name, near)
        params[role.name] = emit.slot(f"{slot}.{slot_role(role.name)}", value, front.term.position, role.name)
    for scalar in front.term.scalars:
        value = slot_value(front.term.position, name, scalar, near)
        scalars[scalar] = emit.slot(f"{slot}.{slot_role(scalar)}", value, front.term.position, scalar)
    values = Evaluator(emit, params, scalars)
    values.weight = lambda: to_logical(emit, _given(weight), front.site)
    return values


def prompts(
    emit: Emit,
    fronts: Sequence[VirtualTokens],
    slot_value: SlotValue,
    near: fx.Node,
    *,
    dtype: torch.dtype,
    weight: fx.Node | None = None,
    tasks: fx.Node | None = None,
) -> fx.Node:
    """The prompts of all fronts, `[1, length, out]`, or `[rows, length, out]` where `tasks` `[rows]` chooses."""
    made = []
    for front in fronts:
        value = front_value(emit, front, slot_value, near, weight).of(front.term.weight)
        if front.tasks:
            value = emit.call(aten.index_select.default, value, 0, _given(tasks))
        else:
            value = emit.call(aten.unsqueeze.default, value, 0)
        made.append(emit.cast(value, dtype))
    if len(made) == 1:
        return made[0]
    if any(each.tasks for each in fronts):
        rows = emit.call(aten.sym_size.int, _given(tasks), 0)
        made = [
            value if front.tasks else expanded(emit, value, rows) for value, front in zip(made, fronts, strict=True)
        ]
    return emit.call(aten.cat.default, made, 1)


def expanded(emit: Emit, value: fx.Node, rows: fx.Node) -> fx.Node:
    """A value for every row: its first axis, of size 1 or already `rows`, stretched."""
    sizes = [-1] * (emit.tensor(value).dim() - 1)
    return emit.call(aten.expand.default, value, [rows, *sizes])


def by_slot(emit: Emit, prefix: fx.Node, site: Site, length: int) -> fx.Node:
    """A prefix `[1, length, out]` as `[slots, heads, length, size]`: each layer's keys and its values are a slot."""
    size = site.in_features // site.heads
    prefix = emit.call(aten.reshape.default, prefix, [length, 2 * site.layers, site.heads, size])
    return emit.call(aten.permute.default, prefix, [1, 2, 0, 3])


def length_of(fronts: Sequence[VirtualTokens]) -> int:
    """How many virtual tokens the fronts come to together."""
    return sum(each.length for each in fronts)


def _given(node: fx.Node | None) -> fx.Node:
    assert node is not None
    return node
