"""Lets attention look at virtual tokens more or less than it would."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from peftc.passes.insert.insert_delta import SlotValue, UnfitError
from peftc.passes.ir.emit import Emit
from peftc.passes.plan.structure import LOG_WEIGHT, VirtualTokens, site_slot
from peftc.passes.virtual_tokens.attention import OPERATOR, SAME_SIZES, SOFTMAX, VIEWS, Attention, attentions

aten = torch.ops.aten

_MOVES = (
    *(*SAME_SIZES, *VIEWS, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor),
    *(aten.transpose.int, aten.permute.default, aten.repeat.default),
)


def weighted(fronts: Sequence[VirtualTokens]) -> bool:
    """Whether attention to any of them has a weight."""
    return any(each.weighted for each in fronts)


def cached_attentions(graph: fx.Graph, own: Sequence[fx.Node], front: VirtualTokens) -> list[Attention]:
    """What attends to the keys of a decoder's cache, of which `own` are the inputs. Raises UnfitError."""
    found = [each for each in attentions(graph) if isinstance(each, Attention) and _reads(each.key, set(own))]
    if len(found) != len(own) // 2:
        message = f"the attention of {len(found)} of its {len(own) // 2} layers is found, so it takes no weight"
        raise UnfitError(front.site, message)
    return found


@dataclass
class Weighing:
    """softmax(scores)  ->  softmax(scores + log(weight)), where a key is a virtual token's

    So the attention paid to it is multiplied by the weight before it is normalised. `start` makes nodes in front of all
    that attend. A mask that layers share is changed once, and is of numbers then.
    """

    start: Emit
    fronts: Sequence[VirtualTokens]
    slot_value: SlotValue
    near: fx.Node
    masks: dict[tuple[fx.Node | None, fx.Node | None, torch.dtype], fx.Node] = field(default_factory=dict)
    logs: dict[tuple[int, torch.dtype], fx.Node] = field(default_factory=dict)

    def all(self, attentions: Iterable[Attention]) -> None:
        """Weigh what these attend to; virtual tokens are the first of their keys already."""
        for each in attentions:
            if each.is_causal:
                raise UnfitError(self.fronts[0].site, f"{each.module} hides what comes later without a mask")
            if each.node.target is OPERATOR:
                self._operator(each.node)
            else:
                self._softmax(each.node)

    def _operator(self, node: fx.Node) -> None:
        query, key, _, *rest = node.args
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        mask = rest[0] if rest else node.kwargs.get("attn_mask")
        assert mask is None or isinstance(mask, fx.Node)
        dtype = query.meta["val"].dtype
        whole = mask if mask is not None and _is_whole(mask) else None
        known = (mask, key if whole is None else None, dtype)
        if known not in self.masks:
            if whole is None:
                emit = self._before(node, node)
                bias = self._bias(emit, key, -2, dtype)
            else:
                # A mask that layers share is not the first one's; what was widened may stand before the weights.
                emit = self._before(node if "peftc" in whole.meta else whole.next, whole)
                bias = self._bias(emit, whole, -1, dtype)
            if mask is None:
                for _ in range(3):
                    bias = emit.call(aten.unsqueeze.default, bias, 0)
            elif emit.tensor(mask).dtype == torch.bool:
                bias = emit.call(aten.where.ScalarOther, mask, bias, float("-inf"))
            else:
                bias = emit.call(aten.add.Tensor, mask, bias)
            self.masks[known] = bias
            self.start.made += emit.made
        if rest:
            node.args = (*node.args[:3], self.masks[known], *rest[1:])
        else:
            node.kwargs = {**node.kwargs, "attn_mask": self.masks[known]}

    def _softmax(self, product: fx.Node) -> None:
        node = product.args[0]
        while isinstance(node, fx.Node) and node.target not in SOFTMAX:
            node = node.args[0]
        assert isinstance(node, fx.Node)
        scores, emit = node.args[0], self._before(node, node)
        assert isinstance(scores, fx.Node)
        bias = self._bias(emit, scores, -1, emit.tensor(scores).dtype)
        node.replace_input_with(scores, emit.call(aten.add.Tensor, scores, bias))
        self.start.made += emit.made

    def _bias(self, emit: Emit, like: fx.Node, axis: int, dtype: torch.dtype) -> fx.Node:
        """What is added to the score of each key, `[keys]`; `like` has the keys at an axis."""
        value = emit.tensor(like)
        keys = emit.call(aten.sym_size.int, like, value.dim() + axis)
        places = emit.call(aten.arange.default, keys, device=value.device)
        stop, bias = sum(each.length for each in self.fronts), None
        for front in reversed(self.fronts):
            here = emit.call(aten.lt.Scalar, places, stop)
            log = self._log(front, dtype) if front.weighted else None
            if bias is not None:
                given = (aten.where.self, log) if log is not None else (aten.where.ScalarSelf, 0.0)
                bias = emit.call(given[0], here, given[1], bias)
            elif log is not None:
                bias = emit.call(aten.where.ScalarOther, here, log, 0.0)
            stop -= front.length
        assert bias is not None
        return bias

    def _log(self, front: VirtualTokens, dtype: torch.dtype) -> fx.Node:
        position, site = front.term.position, front.site.name
        if (position, dtype) not in self.logs:
            value = self.slot_value(position, site, LOG_WEIGHT, self.near)
            node = self.start.slot(f"{site_slot(position, site)}.{LOG_WEIGHT}", value, position, LOG_WEIGHT)
            if value.dtype != dtype:
                node = self.start.call(aten.to.dtype, node, dtype)
            self.logs[position, dtype] = node
        return self.logs[position, dtype]

    def _before(self, node: fx.Node, like: fx.Node) -> Emit:
        return Emit(self.start.graph, node, self.start.origin, like=like)


def _reads(node: fx.Node, own: set[fx.Node]) -> bool:
    """Whether keys are those of the cache and the new ones, only moved."""
    while own.isdisjoint(node.all_input_nodes):
        if node.target not in _MOVES or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _is_whole(mask: fx.Node) -> bool:
    """Whether the mask has a place for each key."""
    size = mask.meta["val"].shape[-1]
    return not (isinstance(size, int) and size == 1)
