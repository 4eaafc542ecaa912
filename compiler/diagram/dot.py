"""The picture as DOT text."""

import html
from collections.abc import Iterable

import pydot

from peftc.compiler.diagram import style
from peftc.compiler.diagram.front import IN_FRONT
from peftc.compiler.diagram.model import ROOT, Cluster, Edge, Node, Picture
from peftc.compiler.diagram.operators import TIMES

ROUND = ("add", "multiply", "join")
SMALL = '<font point-size="8" color="{}">{}</font>'


def to_dot(picture: Picture, *, shapes: bool = False) -> str:
    """Deterministic DOT text. `shapes` writes the shape of each tensor beside its edge; tooltips always have it."""
    dot = pydot.Dot("peftc", graph_type="digraph", rankdir="TB", compound="true", nodesep="0.22", ranksep="0.28")
    dot.set_graph_defaults(fontname="Helvetica", fontsize="10", labeljust="l", style="rounded")
    dot.set_node_defaults(**style.BASE, shape="box", style='"rounded,filled"', height="0.3", margin='"0.1,0.06"')
    dot.set_edge_defaults(fontname="Helvetica", fontsize="8", arrowsize="0.6", color=_quoted(style.INK))
    ids = {node.id: f"n{index}" for index, node in enumerate(picture.nodes)}
    colours = {
        n.id: style.adapter_colour(n.position) for n in picture.nodes if n.position is not None and n.kind == "adapter"
    }
    returned = {edge.source for edge in picture.edges if edge.kind == "returned"}
    frames: dict[str, pydot.Graph] = {ROOT: dot}
    depth = {ROOT: 0}
    for cluster in _outer_first(picture.clusters):
        depth[cluster.path] = depth[cluster.parent] + 1
        frames[cluster.path] = _frame(cluster, f"c{len(frames)}", depth[cluster.path])
    for node in picture.nodes:
        frames[node.cluster].add_node(_node(node, ids[node.id], picture, node.id in returned))
    for cluster in reversed(list(_outer_first(picture.clusters))):
        frames[cluster.parent].add_subgraph(frames[cluster.path])
    for edge in picture.edges:
        if edge.kind != "returned":
            dot.add_edge(_edge(edge, ids, shapes, colours.get(edge.source) or colours.get(edge.target)))
    dot.add_subgraph(_legend(picture))
    return str(dot.to_string())


def _outer_first(clusters: Iterable[Cluster]) -> list[Cluster]:
    waiting, ready, known = list(clusters), [], {ROOT}
    while waiting:
        for cluster in list(waiting):
            if cluster.parent in known:
                known.add(cluster.path)
                ready.append(cluster)
                waiting.remove(cluster)
    return ready


def _frame(cluster: Cluster, name: str, depth: int) -> pydot.Cluster:
    said = f"<b>{_text(cluster.label)}</b>" if cluster.label else ""
    kind = SMALL.format(style.QUIET, _text(cluster.type)) if cluster.type else ""
    folded = cluster.fold is not None
    return pydot.Cluster(
        name,
        label=f"<{said} {kind}>",
        tooltip=_quoted(cluster.module),
        color=_quoted(style.INK if folded else style.FRAME),
        fontcolor=_quoted(style.INK),
        style='"rounded,filled,bold"' if folded else '"rounded,filled"',
        fillcolor=_quoted(style.DEPTHS[min(depth, len(style.DEPTHS) - 1)]),
    )


def _node(node: Node, name: str, picture: Picture, is_returned: bool) -> pydot.Node:
    wide = {"label": _label(node, picture, is_returned), "tooltip": _quoted(*_tooltip(node))}
    fill, ink, border = style.FILLS[node.kind], style.INK, style.QUIET
    if node.kind == "adapter":
        fill = border = style.adapter_colour(node.position or 0)
        ink = "#ffffff"
    if node.kind in ("join", "widened"):
        border = style.ADAPTERS[0] if node.position is None else style.adapter_colour(node.position)
    if node.kind in ROUND:
        if is_returned:
            wide["xlabel"] = f"<{SMALL.format(style.QUIET, '→ output')}>"
        wide |= {"shape": "circle", "width": "0.22", "height": "0.22", "margin": "0", "fixedsize": "true"}
    if node.kind in ("plumbing", "weight"):
        ink = "#868e96"
    if node.status == "context":
        fill, ink, wide["style"] = "#ffffff", style.QUIET, '"rounded,filled,dashed"'
    if node.status == "added":
        border, wide["penwidth"] = style.ADDED, "2.5"
    if node.status == "removed":
        border, ink, wide["style"] = style.REMOVED, style.REMOVED, '"rounded,filled,dashed"'
    return pydot.Node(name, **wide, fillcolor=_quoted(fill), fontcolor=_quoted(ink), color=_quoted(border))


def _label(node: Node, picture: Picture, is_returned: bool) -> str:
    faint = "#ffffff" if node.kind == "adapter" else "#868e96"
    title = node.title
    if node.kind == "adapter" and node.position is not None:
        title = " ".join(each for each in (picture.adapter_name(node.position), title) if each)
    said = _text(title) or " "
    parts = [f"<b>{said}</b>" if node.kind == "adapter" else said]
    if node.status == "removed":
        parts = [f"<s>{parts[0]}</s>"]
    parts += [SMALL.format(faint, _text(line)) for line in node.lines if line]
    for weight in node.weights:
        if weight.tied:
            parts.append(SMALL.format(faint, _text(f"tied with {', '.join(weight.tied)}")))
        if weight.status == "removed":
            parts.append(SMALL.format(style.REMOVED, f"<s>{_text(weight.name.rpartition('.')[2])}</s>"))
    if is_returned and node.kind not in ROUND:
        parts.append(SMALL.format(faint, "→ output"))
    return f"<{'<br/>'.join(parts)}>"


def _tooltip(node: Node) -> list[str]:
    lines = [node.site or node.module or node.title, *(f"{each.name} {each.shape}" for each in node.weights)]
    if node.operators:
        lines.append(", ".join(node.operators))
    if node.shape:
        lines.append(f"gives {node.shape}")
    return lines


def _edge(edge: Edge, ids: dict[str, str], shapes: bool, colour: str | None) -> pydot.Edge:
    more = {"tooltip": _quoted(edge.shape or "flow")}
    if colour is not None:
        more["color"] = _quoted(colour)
    if shapes and edge.shape:
        more["label"] = _quoted(edge.shape)
    if edge.kind == "quiet":
        more |= {"color": _quoted(style.QUIET), "arrowsize": "0.4", "weight": "0"}
    if edge.kind == "through":
        more |= {"style": "dotted", "color": _quoted(style.QUIET)}
    if edge.kind == "removed":
        more |= {"style": "dashed", "color": _quoted(style.REMOVED), "arrowhead": "vee", "constraint": "false"}
    return pydot.Edge(ids[edge.source], ids[edge.target], **more)


def _legend(picture: Picture) -> pydot.Cluster:
    frame = pydot.Cluster("legend", label="<<b>legend</b>>", color=_quoted(style.FRAME), style="rounded")
    rows = []
    kinds = {node.kind for node in picture.nodes}
    positions = sorted({node.position for node in picture.nodes if node.position is not None})
    statuses = {node.status for node in picture.nodes} | {edge.kind for edge in picture.edges}
    for position in positions:
        colour = style.adapter_colour(position)
        rows.append((colour, colour, "", picture.adapter_name(position) + ": what the adapter computes"))
    for kind, said in style.SAYS.items():
        border = style.ADAPTERS[0] if kind in ("join", "widened") else style.QUIET
        sign = " ".join(sorted({node.title for node in picture.nodes if node.kind == kind})) if kind == "join" else ""
        if kind in kinds:
            rows.append((style.FILLS[kind], border, sign, said))
    cells = [
        f'<tr><td bgcolor="{fill}" border="1" color="{border}" width="22">{sign or " "}</td>'
        f'<td align="left">{_text(said)}</td></tr>'
        for fill, border, sign, said in rows
    ]
    notes = []
    if any(each.fold for each in picture.clusters):
        notes.append(f"bold frame {TIMES}n: n identical layers in a row, drawn once")
    if any(node.title == IN_FRONT for node in picture.nodes):
        notes.append(f"{IN_FRONT}: put in front of it, to the left of the first token")
    if "returned" in statuses:
        notes.append("→ output: also returned, such as keys and values for the cache")
    if "context" in statuses:
        notes.append("grey, dashed: context; dotted: connected through nodes that are not shown")
    if "added" in statuses:
        notes.append("green border: added by the rewrite")
    if "removed" in statuses:
        notes.append("red, dashed or struck: removed by the rewrite")
    cells += [f'<tr><td colspan="2" align="left">{_text(said)}</td></tr>' for said in notes]
    table = f'<<table border="0" cellborder="0" cellspacing="2">{"".join(cells)}</table>>'
    frame.add_node(pydot.Node("legend_table", shape="plaintext", style='""', fontsize="9", label=table))
    return frame


def _text(said: str) -> str:
    return html.escape(_printable(said), quote=True)


def _quoted(*lines: str) -> str:
    """A DOT string; graphviz reads backslashes in it, and entities."""
    escaped = (_printable(each).replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"') for each in lines)
    return '"' + "\\n".join(escaped) + '"'


def _printable(said: str) -> str:
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in said)
