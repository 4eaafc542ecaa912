"""The DOT text is valid, the same every time, and safe whatever things are called."""

import html
import shutil
import subprocess

import pydot
import pytest

from peftc.compiler.diagram import Picture, build, diff, to_dot
from peftc.compiler.diagram.model import Cluster, Edge, Node, Weight

ODD = 'a"b\\c<d>&e\n\x00é{|}→'


def parsed(text: str) -> pydot.Dot:
    (dot,) = pydot.graph_from_dot_data(text)
    return dot


def drawn_nodes(dot: pydot.Graph) -> list[pydot.Node]:
    inner = [node for sub in dot.get_subgraphs() for node in drawn_nodes(sub)]
    return [node for node in dot.get_nodes() if node.get_name() not in ("node", "edge", "graph")] + inner


def test_golden(tiny, golden) -> None:
    golden("diagram/tiny.dot", to_dot(diff(tiny.before(), tiny.after(), names=("a",))))


def test_the_same_text_every_time(llama) -> None:
    assert to_dot(build(llama.after("alike"))) == to_dot(build(llama.after("alike")))


def test_it_parses_back_with_every_node_and_edge(llama) -> None:
    picture = build(llama.after("alike"))
    dot = parsed(to_dot(picture))
    assert len(drawn_nodes(dot)) == len(picture.nodes) + 1  # and the legend
    drawn = [edge for edge in picture.edges if edge.kind != "returned"]
    assert len(dot.get_edges()) == len(drawn)


def odd() -> Picture:
    node = Node(
        ODD,
        "adapter",
        ODD,
        lines=(ODD,),
        module=ODD,
        cluster=ODD,
        shape=ODD,
        site=ODD,
        position=0,
        weights=(Weight(ODD, ODD, (ODD,), "removed"),),
        operators=(ODD,),
    )
    other = Node("plain", "operator", "")
    cluster = Cluster(ODD, "", ODD, ODD, ODD)
    return Picture((cluster,), (node, other), (Edge(ODD, "plain", shape=ODD), Edge(ODD, "plain", "removed")), (ODD,))


def test_odd_names_are_escaped() -> None:
    text = to_dot(odd(), shapes=True)
    dot = parsed(text)
    assert len(drawn_nodes(dot)) == 3
    assert "\x00" not in text
    label = next(node for node in drawn_nodes(dot) if node.get_name() == "n0").get_label()
    assert html.escape('a"b\\c<d>&e') in label


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graphviz_accepts_odd_names() -> None:
    drawn = subprocess.run(["dot", "-Tplain"], input=to_dot(odd(), shapes=True).encode(), capture_output=True)
    assert (drawn.returncode, drawn.stderr) == (0, b"")


def test_each_adapter_has_its_colour_and_its_line_in_the_legend(llama) -> None:
    text = to_dot(build(llama.after("alike", "head"), names=("alike", "head")))
    fills = {node.get_fillcolor() for node in drawn_nodes(parsed(text)) if "<b>" in (node.get_label() or "")}
    assert len(fills - {None}) == 2
    assert "alike: what the adapter computes" in text
    assert "head: what the adapter computes" in text


def test_the_legend_explains_only_what_is_there(llama) -> None:
    plain, folded = (to_dot(build(llama.before(), unfold=unfold)) for unfold in (True, False))
    assert "drawn once" in folded
    assert "drawn once" not in plain
    assert "adapter" not in plain
    assert "removed by the rewrite" not in folded


def test_shapes_on_demand(tiny) -> None:
    picture = build(tiny.after())
    edges = parsed(to_dot(picture, shapes=True)).get_edges()
    assert {edge.get_label() for edge in edges} >= {'"·×8"'}
    assert not any(edge.get_label() for edge in parsed(to_dot(picture)).get_edges())
