"""Identical layers in a row are drawn once; anything that differs is not hidden."""

from dataclasses import replace

from peftc.compiler.diagram import Picture, build
from peftc.compiler.diagram.fold import fold
from peftc.compiler.diagram.layers import settled
from peftc.compiler.diagram.model import Cluster, Edge, Node


def folds(picture: Picture) -> list[tuple[str, int]]:
    return [(cluster.label, cluster.fold.count) for cluster in picture.clusters if cluster.fold]


def test_identical_layers_fold_with_their_count(llama) -> None:
    picture = build(llama.after("alike"))
    assert folds(picture) == [("layers 0-3, ×4", 4)]
    (cluster,) = [each for each in picture.clusters if each.fold]
    assert cluster.fold is not None
    assert cluster.fold.paths == tuple(f"model.layers.{index}" for index in range(4))
    assert not [node for node in picture.nodes if node.module.startswith("model.layers.1")]
    (adapter,) = [n for n in picture.nodes if n.kind == "adapter" and n.module.endswith("q_proj")]
    assert len(adapter.folded) == 3 * len(adapter.members)


def test_a_layer_of_another_rank_stands_alone(llama) -> None:
    picture = build(llama.after("mixed"))
    assert folds(picture) == [("layers 0-1, ×2", 2)]
    assert {"model.layers.0", "model.layers.2", "model.layers.3"} <= {each.path for each in picture.clusters}


def test_a_layer_with_one_more_adapter_stands_alone(llama) -> None:
    assert folds(build(llama.after("head"))) == [("layers 1-3, ×3", 3)]


def test_unfold(llama) -> None:
    picture = build(llama.after("alike"), unfold=True)
    assert folds(picture) == []
    assert {f"model.layers.{index}" for index in range(4)} <= {each.path for each in picture.clusters}


def test_what_leads_in_and_out_of_a_run_stays(llama) -> None:
    picture = build(llama.after("alike"))
    titles = {node.id: node.title for node in picture.nodes}
    edges = {(titles[edge.source], titles[edge.target]) for edge in picture.edges}
    assert ("embed_tokens", "input_layernorm") in edges
    assert ("+", "norm") in edges
    assert all({edge.source, edge.target} <= titles.keys() for edge in picture.edges)


def chain(count: int) -> Picture:
    """in -> layers 0.. of two nodes each -> out, with a side input to every layer."""
    ends = [Node("in", "input", "in"), Node("side", "input", "side"), Node("out", "output", "out")]
    clusters, nodes, edges, last = [], ends, [], "in"
    for index in range(count):
        clusters.append(Cluster(f"l.{index}", "", f"l.{index}", f"l.{index}"))
        for name in ("a", "b"):
            nodes.append(Node(f"{name}{index}", "operator", name, module=f"l.{index}.{name}", cluster=f"l.{index}"))
        edges += [Edge(last, f"a{index}"), Edge(f"a{index}", f"b{index}"), Edge("side", f"b{index}")]
        last = f"b{index}"
    return Picture(tuple(clusters), tuple(nodes), (*edges, Edge(last, "out")))


def test_a_chain_folds() -> None:
    picture = fold(chain(5))
    assert folds(picture) == [("l 0-4, ×5", 5)]
    assert {(e.source, e.target) for e in picture.edges} == {("in", "a0"), ("a0", "b0"), ("side", "b0"), ("b0", "out")}


def test_a_layer_whose_result_is_used_elsewhere_ends_a_run() -> None:
    picture = chain(5)
    tapped = replace(picture, edges=(*picture.edges, Edge("b2", "out")))
    assert folds(fold(tapped)) == [("l 0-2, ×3", 3), ("l 3-4, ×2", 2)]


def test_a_layer_with_an_input_of_its_own_starts_a_run() -> None:
    picture = chain(5)
    fed = replace(picture, edges=(*picture.edges, Edge("side", "a3")))
    assert folds(fold(fed)) == [("l 0-2, ×3", 3), ("l 3-4, ×2", 2)]


def test_a_layer_connected_differently_inside_stands_alone() -> None:
    picture = chain(4)
    turned = tuple(Edge("b1", "a1") if (e.source, e.target) == ("a1", "b1") else e for e in picture.edges)
    assert folds(fold(replace(picture, edges=turned))) == [("l 2-3, ×2", 2)]


def test_layers_that_are_not_in_a_row_do_not_fold() -> None:
    picture = chain(3)
    kept = [each for each in picture.clusters if each.path != "l.1"]
    nodes = [each for each in picture.nodes if each.cluster != "l.1"]
    edges = [Edge("b0", "a2"), *(e for e in picture.edges if "1" not in e.source + e.target)]
    assert folds(fold(Picture(tuple(kept), tuple(nodes), tuple(edges)))) == []


def test_inputs_of_one_layer_fold_with_it() -> None:
    picture = chain(3)
    caches = tuple(Node(f"past_{index}", "input", f"past_{index}") for index in range(3))
    reads = tuple(Edge(f"past_{index}", f"b{index}") for index in range(3))
    whole = settled(replace(picture, nodes=(*picture.nodes, *caches), edges=(*picture.edges, *reads)))
    assert {node.id: node.cluster for node in whole.nodes if node.kind == "input"} == {
        "in": "",
        "side": "",
        "past_0": "l.0",
        "past_1": "l.1",
        "past_2": "l.2",
    }
    folded = fold(whole)
    assert folds(folded) == [("l 0-2, ×3", 3)]
    assert [node.title for node in folded.nodes if node.kind == "input"] == ["in", "side", "past_*"]
