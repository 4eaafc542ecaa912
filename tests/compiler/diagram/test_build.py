"""Every node of a graph is in its picture, once, and the picture says what it is."""

import networkx as nx
import pytest
from torch import fx

from peftc.compiler.diagram import Picture, build
from peftc.compiler.diagram.model import Node


def shown(picture: Picture) -> list[str]:
    return sorted(name for node in picture.nodes for name in (*node.members, *node.folded))


def by_title(picture: Picture, module: str, kind: str) -> Node:
    (found,) = [node for node in picture.nodes if node.module == module and node.kind == kind]
    return found


@pytest.mark.parametrize("unfold", [False, True])
@pytest.mark.parametrize("graphs", ["llama", "experts", "tiny"])
def test_every_node_is_shown_exactly_once(graphs: str, unfold: bool, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(graphs)
    for graph in (source.before(), source.after()):
        assert shown(build(graph, unfold=unfold)) == sorted(node.name for node in graph.nodes)


def test_every_rewritten_node_is_in_an_adapter_a_join_or_a_weight_it_moves(llama, experts) -> None:
    for graph in (llama.after("alike"), llama.after("head"), experts.after()):
        homes = {name: node for node in build(graph, unfold=True).nodes for name in node.members}
        made = [node for node in graph.nodes if "peftc" in node.meta]
        assert made
        assert {homes[node.name].kind for node in made} <= {"adapter", "join", "weight"}
        assert all(homes[node.name].site == node.meta["peftc"].site for node in made)


def test_the_graph_is_not_changed(llama) -> None:
    graph = llama.after("alike")
    before = str(graph)
    build(graph)
    assert str(graph) == before


def test_the_picture_has_no_cycle(llama, experts) -> None:
    for graph in (llama.after("alike"), llama.before(), experts.after()):
        picture = build(graph, unfold=True)
        assert nx.is_directed_acyclic_graph(nx.DiGraph([(edge.source, edge.target) for edge in picture.edges]))


def test_clusters_follow_the_module_tree(llama) -> None:
    picture = build(llama.after("alike"), unfold=True)
    parents = {cluster.path: cluster.parent for cluster in picture.clusters}
    assert parents["model.layers.1.self_attn.q_proj"] == "model.layers.1.self_attn"
    assert parents["model.layers.1.self_attn"] == "model.layers.1"
    assert parents["model.layers.1"] == "model"
    assert parents["model"] == ""
    # What is one node needs no frame: k_proj has no adapter.
    assert "model.layers.1.self_attn.k_proj" not in parents
    assert {c.path: c.label for c in picture.clusters}["model.layers.1"] == "layers.1"


def test_an_adapted_linear_is_the_base_the_adapter_and_their_sum(llama) -> None:
    picture = build(llama.after("alike"), unfold=True)
    module = "model.layers.1.self_attn.q_proj"
    base, adapter, join = (by_title(picture, module, kind) for kind in ("operator", "adapter", "join"))
    assert (base.title, base.lines) == ("q_proj", ("linear", "16 → 16"))
    assert [weight.name for weight in base.weights] == [f"{module}.weight"]
    assert adapter.lines == ("A 4×16", "× s", "B 16×4")
    assert (adapter.position, adapter.site) == (0, module)
    edges = {(edge.source, edge.target) for edge in picture.edges}
    assert {(base.id, join.id), (adapter.id, join.id)} <= edges
    norm = by_title(picture, "model.layers.1.input_layernorm", "norm")
    assert {(norm.id, base.id), (norm.id, adapter.id)} <= edges


def test_a_norm_is_one_node(llama) -> None:
    norm = by_title(build(llama.before(), unfold=True), "model.norm", "norm")
    assert norm.title == "norm"
    assert norm.lines == ("LlamaRMSNorm",)
    assert {"pow", "mean", "rsqrt", "mul"} <= set(norm.operators)


def test_plumbing_does_not_drown_the_picture(llama) -> None:
    graph = llama.before()
    picture = build(graph, unfold=True)
    inside = [node for node in picture.nodes if node.cluster.startswith("model.layers.1")]
    titles = sorted(node.title for node in inside)
    attention = ["q_proj", "k_proj", "v_proj", "rotate", "rotate", "attention", "o_proj"]
    mlp = ["gate_proj", "act_fn", "up_proj", "×", "down_proj"]
    assert titles == sorted(["input_layernorm", *attention, "+", "post_attention_layernorm", *mlp, "+"])
    assert [node.title for node in picture.nodes if node.kind == "plumbing" and node.cluster == "model"] == [
        "positions",
        "mask",
        "rotary_emb",
    ]


def test_masks_are_quiet_and_caches_are_returned(llama) -> None:
    picture = build(llama.before(), unfold=True)
    titles = {node.id: node.title for node in picture.nodes}
    kinds = {(titles[edge.source], titles[edge.target]): edge.kind for edge in picture.edges}
    assert kinds["mask", "attention"] == "quiet"
    assert kinds["input_ids", "embed_tokens"] == "flow"
    assert kinds["v_proj", "output"] == "returned"
    assert kinds["lm_head", "output"] == "flow"


def test_tied_weights_name_each_other(llama) -> None:
    picture = build(llama.before())
    tied = {weight.name: weight.tied for node in picture.nodes for weight in node.weights if weight.tied}
    assert tied == {
        "model.embed_tokens.weight": ("lm_head.weight",),
        "lm_head.weight": ("model.embed_tokens.weight",),
    }


def test_two_adapters_have_their_own_nodes_and_one_sum(llama) -> None:
    picture = build(llama.after("alike", "head"), unfold=True, names=("alike", "head"))
    inside = [node for node in picture.nodes if node.module == "model.layers.0.self_attn.q_proj"]
    assert sorted((node.kind, node.position) for node in inside if node.kind == "adapter") == [
        ("adapter", 0),
        ("adapter", 1),
    ]
    assert sum(node.kind == "join" for node in inside) == 1
    assert (picture.adapter_name(1), picture.adapter_name(2)) == ("head", "adapter 2")


def test_a_trained_copy_feeds_the_operator_that_reads_it(llama) -> None:
    picture = build(llama.after("head"))
    copy = by_title(picture, "lm_head", "adapter")
    head = by_title(picture, "lm_head", "operator")
    assert (copy.title, copy.lines) == ("trained copy", ("weight 32×16",))
    assert head.weights == ()
    assert (copy.id, head.id) in {(edge.source, edge.target) for edge in picture.edges}


def test_a_materialised_weight_is_drawn(experts) -> None:
    picture = build(experts.after())
    module = "model.layers.0.mlp.experts"
    weights = {node.title: node for node in picture.nodes if node.kind == "weight"}
    assert {title: node.lines for title, node in weights.items()} == {
        "gate_up_proj": ("4×16×16",),
        "down_proj": ("4×16×8",),
    }
    joins = {node.site: node for node in picture.nodes if node.kind == "join"}
    edges = {(edge.source, edge.target) for edge in picture.edges}
    for leaf, weight in weights.items():
        assert (weight.id, joins[f"{module}.{leaf}"].id) in edges


def test_a_graph_without_modules_is_drawn_too() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    picture = build(graph)
    assert [node.kind for node in picture.nodes] == ["input", "output"]
    assert picture.clusters == ()
