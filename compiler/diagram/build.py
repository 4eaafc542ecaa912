"""From an fx graph to the picture of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from peftc.compiler.diagram.focus import narrow
from peftc.compiler.diagram.fold import fold
from peftc.compiler.diagram.front import IN_FRONT, is_cached, is_cut, is_front
from peftc.compiler.diagram.group import Grouping, group
from peftc.compiler.diagram.label import label
from peftc.compiler.diagram.layers import settled
from peftc.compiler.diagram.model import ROOT, Cluster, Edge, Node, Picture, Weight
from peftc.compiler.diagram.operators import holds_tensor, is_empty, is_plumbing, name_of, origin_of, shape_of
from peftc.compiler.diagram.scope import Scope, relative, scopes

FRAMED = 2  # nodes that make a frame worth its line


def build(
    graph: fx.Graph,
    *,
    unfold: bool = False,
    focus: Callable[[str], bool] | None = None,
    names: Sequence[str] = (),
) -> Picture:
    """The picture of a graph.

    Args:
        graph: A graph as the passes leave it; it is not changed.
        unfold: Draw every layer of a run of identical ones.
        focus: Says of a module path whether to show it. What is inside is shown too, and what is directly connected,
            as context.
        names: The names of the active adapters, by position.
    """
    return finish(draw(graph, names), unfold=unfold, focus=focus)


def finish(picture: Picture, *, unfold: bool, focus: Callable[[str], bool] | None) -> Picture:
    """Narrow a whole picture to its focus, fold it, and drop the frames that hold nothing."""
    if focus is not None:
        picture = narrow(picture, focus)
    if not unfold:
        picture = fold(picture)
    return pruned(picture)


def draw(graph: fx.Graph, names: Sequence[str] = ()) -> Picture:
    """Every group as a node, every module call as a cluster."""
    grouping = group(graph)
    ties = _ties(graph)
    nodes: dict[fx.Node, Node] = {}
    clusters: dict[str, Cluster] = {}
    order = grouping.partition.order
    for members in sorted(grouping.partition.groups(), key=lambda members: order[_main(members)]):
        around = _place(members, grouping)
        for index, scope in enumerate(around):
            if scope.path and scope.path not in clusters:
                outer = around[index - 1] if index else None
                clusters[scope.path] = Cluster(
                    scope.path,
                    outer.path if outer else ROOT,
                    scope.module,
                    relative(scope.module, outer.module if outer else ""),
                    scope.type,
                )
        nodes[grouping.partition.of(members[0])] = _node(members, around, grouping, ties)
    edges = _edges(graph, grouping, nodes)
    return settled(Picture(tuple(clusters.values()), tuple(nodes.values()), edges, tuple(names)))


def pruned(picture: Picture) -> Picture:
    """Without clusters that hold nothing, and without frames around a single node."""
    held = Counter(node.cluster for node in picture.nodes)
    frames: Counter[str] = Counter()
    dropped: dict[str, str] = {}
    for cluster in reversed(picture.clusters):  # the inner ones first
        if cluster.fold is None and not frames[cluster.path] and held[cluster.path] < FRAMED:
            dropped[cluster.path] = cluster.parent
            held[cluster.parent] += held[cluster.path]
        else:
            frames[cluster.parent] += 1

    def kept(path: str) -> str:
        while path in dropped:
            path = dropped[path]
        return path

    return replace(
        picture,
        clusters=tuple(each for each in picture.clusters if each.path not in dropped),
        nodes=tuple(replace(each, cluster=kept(each.cluster)) for each in picture.nodes),
    )


def _place(members: Sequence[fx.Node], grouping: Grouping) -> tuple[Scope, ...]:
    """The module calls around a group: those of the operator that does its work."""
    drawn = [each for each in members if each.op == "call_function" and holds_tensor(each)]
    if any(each.op in ("placeholder", "output") for each in members):
        return ()
    wider = next((grouping.widened[each] for each in members if each in grouping.widened), None)
    if wider is not None:
        return () if any(map(is_cut, members)) else scopes(wider)
    if any(map(is_cached, members)) and not any(each in grouping.led for each in members):
        return ()  # every layer has a part of it
    working = [each for each in drawn if not is_plumbing(each)] or drawn or list(members)
    for each in working:
        if scopes(each):
            return scopes(each)
    users = [user for each in members for user in each.users if each not in grouping.led or holds_tensor(user)]
    return next((scopes(user) for user in users if scopes(user)), ())


def _node(
    members: Sequence[fx.Node], around: tuple[Scope, ...], grouping: Grouping, ties: dict[str, tuple[str, ...]]
) -> Node:
    said = label(members, grouping)
    last = members[-1]
    shows = said.kind in ("adapter", "widened") or said.title == IN_FRONT
    made = [each for each in members if shows or not is_front(each)]  # pieces of the base's stay its own
    origin = next((each for each in map(origin_of, made) if each is not None and each.site), None)
    positions = {grouping.position[each] for each in members if each in grouping.position}
    position = max(positions) if positions and shows else None
    weights = tuple(
        Weight(str(each.target), shape_of(each), ties.get(str(each.target), ()))
        for each in members
        if each.op == "get_attr" and origin_of(each) is None and not is_empty(each) and said.kind != "output"
    )
    calls = [each for each in members if each.op == "call_function"]
    working = [each for each in calls if not is_plumbing(each) and holds_tensor(each)]
    return Node(
        id=_main(members).name,
        kind=said.kind,
        title=said.title,
        lines=said.lines,
        module=around[-1].module if around else "",
        cluster=around[-1].path if around else ROOT,
        shape=shape_of(working[-1] if working else last),
        site=origin.site if origin is not None else "",
        position=position,
        weights=weights,
        operators=tuple(dict.fromkeys(name_of(each) for each in working)),
        members=tuple(each.name for each in members),
    )


def _main(members: Sequence[fx.Node]) -> fx.Node:
    for each in members:
        if each.op in ("placeholder", "output") or (each.op == "call_function" and not is_plumbing(each)):
            return each
    return members[0]


def _ties(graph: fx.Graph) -> dict[str, tuple[str, ...]]:
    """Names under which one tensor is read. Splitting the owners of a tied weight keeps its fake value."""
    by_value: dict[int, list[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and origin_of(node) is None and not is_empty(node):
            names = by_value.setdefault(id(node.meta.get("val")), [])
            if str(node.target) not in names:
                names.append(str(node.target))
    return {name: tuple(each for each in names if each != name) for names in by_value.values() for name in names}


@dataclass
class _Flow:
    kind: str
    shape: str


def _edges(graph: fx.Graph, grouping: Grouping, nodes: dict[fx.Node, Node]) -> tuple[Edge, ...]:
    found: dict[tuple[str, str], _Flow] = {}
    for user in graph.nodes:
        for index, source in enumerate(user.all_input_nodes):
            first, second = grouping.partition.of(source), grouping.partition.of(user)
            # A weight drawn with its first reader has no line to the others: each names it.
            quiet_read = source.op == "get_attr" and nodes[first].kind not in ("weight", "adapter")
            if first is second or not holds_tensor(source) or is_empty(source) or quiet_read:
                continue
            enters = nodes[first].kind == "input" and user in grouping.data
            kind = "flow" if source in grouping.data or enters or nodes[first].kind == "adapter" else "quiet"
            if user.op == "output" and index > 0:
                kind = "returned"
            key = (nodes[first].id, nodes[second].id)
            if key not in found or (found[key].kind != "flow" and kind == "flow"):
                found[key] = _Flow(kind, shape_of(source))
    return tuple(Edge(*key, flow.kind, flow.shape) for key, flow in found.items())
