"""Puts the nodes of the first layer of a kind where operators stand for layers alike, and looks whether they fit."""

import operator
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from peftc.compiler.trace.stamp import AGAIN, BEGINS, ENDS, Body, StampError
from peftc.passes.ir.bodies import INNER, module_path
from peftc.passes.ir.infer import unbacked
from peftc.passes.ir.verify import VerifyError
from peftc.passes.ir.views import share_storage
from peftc.runtime.regions.within import is_within, moved

Calls = Sequence[tuple[Body, str]]
Names = Mapping[str, tuple[str, ...]]

_STACK = "nn_module_stack"


def expanded(graph: fx.Graph, calls: Calls, aliases: Names) -> fx.Graph:
    """f(begins(x)), again(y, i)  ->  f(x), f_i(y)

    A graph without the operators of `stamp`: `f_i` is `f` with the tensors of layer i. `aliases` are all names of every
    tensor. Raises StampError where the first layer's nodes are not all that there is to it.
    """
    return _Expansion(graph, calls, aliases).run()


@dataclass(frozen=True)
class _Span:
    """The nodes between a layer's marks."""

    begins: fx.Node
    ends: fx.Node
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Move:
    """From the layer that was traced to the one that its nodes are copied for. `stack` is where that one was called."""

    old: str
    new: str
    stack: tuple[tuple[str, Any], ...]

    def moved(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        """Where a copied node is."""
        items = list(stack.items())
        depth = next((at for at, (_, (path, _)) in enumerate(items) if path.split("@")[0] == self.old), None)
        if depth is None:
            return dict(stack)
        inner = {
            key.replace(self.old, self.new, 1): (moved(path.split("@")[0], self.old, self.new) + _count(path), kind)
            for key, (path, kind) in items[depth + 1 :]
        }
        return dict(self.stack) | inner


@dataclass
class _Expansion:
    source: fx.Graph
    calls: Calls
    aliases: Names
    graph: fx.Graph = field(default_factory=fx.Graph)
    known: dict[fx.Node, Any] = field(default_factory=dict)  # of every node of the source, what is in its place
    reads: dict[str, fx.Node] = field(default_factory=dict)
    spans: dict[int, _Span] = field(default_factory=dict)

    def run(self) -> fx.Graph:
        nodes = list(self.source.nodes)
        self._find_spans(nodes)
        for node in nodes:
            if node.op == "get_attr":
                self.known[node] = self.reads[str(node.target)] = self._copied(node, node.name, self.known)
        self._emit([node for node in nodes if node.op != "get_attr"], self.known, None)
        return self.graph

    def _find_spans(self, nodes: Sequence[fx.Node]) -> None:
        places = {node: at for at, node in enumerate(nodes)}
        begins = {node.args[1]: node for node in nodes if node.target is BEGINS}
        for node in nodes:
            if node.target is ENDS:
                number: Any = node.args[1]
                start = begins[number]
                self.spans[number] = _Span(start, node, tuple(nodes[places[start] + 1 : places[node]]))
        found = {_call(node) for node in nodes if node.target is AGAIN}
        again = {number: body for number, (body, _) in enumerate(self.calls) if number != body.call}
        for number, body in again.items():
            if number not in found or body.call not in self.spans:
                raise StampError(f"{body.path} was traced inside of another graph")
        for body in dict.fromkeys(again.values()):
            _check_closed(body.path, self.spans[body.call])

    def _emit(self, nodes: Sequence[fx.Node], env: Any, move: _Move | None) -> None:
        """Append nodes, with what is in the place of those before them in `env`."""
        for node in nodes:
            if node.target is BEGINS or node.target is ENDS:
                env[node] = _taken(node, env)
            elif node.target is AGAIN:
                env[node] = self._again(node, env, move)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), list):
                held, place = node.args
                env[node] = env[held][place]
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], env.__getitem__))
            elif move is None or not _is_shared(node, env):
                name = node.name if node.op == "placeholder" else re.sub(r"_\d+$", "", node.name)
                copied = env[node] = self._copied(node, name, env)
                if move is not None:
                    _keep_view(node, copied, env)
                    if _STACK in copied.meta:
                        copied.meta[_STACK] = move.moved(copied.meta[_STACK])
                    if INNER in copied.meta:
                        inner = copied.meta[INNER].items()
                        copied.meta[INNER] = {
                            at: tuple(moved(path, move.old, move.new) for path in paths) for at, paths in inner
                        }

    def _again(self, node: fx.Node, env: Any, move: _Move | None) -> list[Any]:
        """The nodes of a layer alike, and what they give."""
        body, path = self.calls[_call(node)]
        span = self.spans[body.call]
        stack = dict(node.meta.get(_STACK) or {})
        if move is not None:
            path, stack = moved(path, move.old, move.new), move.moved(stack)
        own: dict[fx.Node, Any] = {span.begins: _taken(node, env)}
        local: Any = ChainMap(own, self.known)
        for each in span.begins.users:
            place: Any = each.args[1]
            own[each] = own[span.begins][place]
        for each in _read_in(span):
            own[each] = self._own(str(each.target), body.path, path)
        left = [each for each in span.nodes if each not in own and each.op != "get_attr"]
        self._emit(left, local, _Move(body.path, path, tuple(stack.items())))
        return _taken(span.ends, local)

    def _own(self, target: str, first: str, path: str) -> fx.Node:
        """What a layer reads where the first of its kind reads this: its own tensor, or what both share."""
        inside = next((each for each in self.aliases.get(target, ()) if is_within(each, first)), None)
        if inside is None:
            return self.reads[target]
        own = moved(inside, first, path)
        for each in (own, *self.aliases.get(own, ())):
            if each in self.reads:
                return self.reads[each]
        raise StampError(f"there is no {own}")

    def _copied(self, node: fx.Node, name: str, env: Any) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        copied = self.graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        copied.meta = dict(node.meta)
        return copied


def _keep_view(node: fx.Node, copied: fx.Node, env: Any) -> None:
    """Have the copy of a view be a view of what it reads itself; all other values layers have in common."""
    value: Any = node.meta.get("val")
    for each in node.all_input_nodes if isinstance(value, FakeTensor) else ():
        old: Any
        new: Any
        old, new = each.meta.get("val"), env[each].meta.get("val")
        if old is not new and isinstance(old, FakeTensor) and share_storage(old, value):
            with value.fake_mode, torch.no_grad():
                copied.meta["val"] = torch.as_strided(new, value.shape, value.stride(), value.storage_offset())
            return


def _call(node: fx.Node) -> int:
    """Which call of a layer an operator stands for."""
    number: Any = node.args[2]
    return int(number)


def _taken(node: fx.Node, env: Any) -> list[Any]:
    """What an operator of `stamp` is given."""
    given: Any = node.args[0]
    return [env[each] for each in given]


def _check_closed(path: str, span: _Span) -> None:
    """Raise StampError unless the nodes of a layer get everything from its inputs and give everything as outputs."""
    inside = set(span.nodes)
    given = unbacked([each.meta.get("val") for each in span.begins.users])
    for node in span.nodes:
        value = node.meta.get("val")
        if unbacked(value) - given:
            raise StampError(f"{path} has a size that only data says")
        if not _is_symbol(value):
            for user in node.users:
                if user not in inside and user is not span.ends:
                    raise StampError(f"{path} keeps something of a call")
        for each in node.all_input_nodes:
            known = each in inside or each is span.begins or each.op == "get_attr"
            if not known and not _is_symbol(each.meta.get("val")):
                raise StampError(f"{path} reads something that it is not given")


def _read_in(span: _Span) -> Iterator[fx.Node]:
    """The tensors of modules that are read."""
    every = (each for node in (*span.nodes, span.ends) for each in node.all_input_nodes)
    yield from dict.fromkeys(each for each in every if each.op == "get_attr")


def _is_symbol(value: Any) -> bool:
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def _is_shared(node: fx.Node, env: Any) -> bool:
    """Whether a node computes of sizes what there is already."""
    local = env.maps[0]
    return _is_symbol(node.meta.get("val")) and not any(each in local for each in node.all_input_nodes)


def _count(path: str) -> str:
    """`@2` of a module's second call."""
    return path[path.index("@") :] if "@" in path else ""


def check_stamps(graph: fx.Graph, calls: Calls, aliases: Names) -> None:
    """Raise VerifyError unless every stamped layer reads its own tensors, all that the first of its kind reads."""
    firsts = {path: body.path for body, path in calls}
    found: dict[str, dict[str, None]] = {path: {} for path in firsts}
    for node in graph.find_nodes(op="get_attr"):
        names = aliases.get(str(node.target), ())
        for user in node.users if names else ():
            for path in {each for each in module_path(user) if each in found}:
                own = next((each for each in names if each.startswith(f"{path}.")), None)
                found[path][str(node.target) if own is None else own[len(path) :]] = None
    for path, first in firsts.items():
        wrong = set(found[path]) ^ set(found[first])
        if wrong:
            each = sorted(wrong)[0]
            reads, other = (path, first) if each in found[path] else (first, path)
            message = f"{path} was made of {first}, but {reads} reads {each.lstrip('.')} and {other} does not"
            raise VerifyError("stamp", message, graph)
