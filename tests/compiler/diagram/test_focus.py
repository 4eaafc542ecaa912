"""A focus shows what it asks for, what that touches, and how the pieces hang together."""

import re

from peftc.compiler.diagram import Picture, build


def titles(picture: Picture, status: str) -> list[str]:
    return sorted(node.title or node.kind for node in picture.nodes if node.status == status)


def test_a_module_and_its_direct_context(llama) -> None:
    picture = build(llama.after("alike"), focus=lambda path: path == "model.layers.1.self_attn.q_proj")
    assert titles(picture, "kept") == ["+", "adapter", "q_proj"]
    assert titles(picture, "context") == ["input_layernorm", "rotate"]
    assert not any(node.module.startswith("model.layers.0") for node in picture.nodes)


def test_what_is_inside_a_module_in_focus_is_shown(llama) -> None:
    picture = build(llama.before(), focus=lambda path: path == "model.layers.2.mlp")
    assert titles(picture, "kept") == ["act_fn", "down_proj", "gate_proj", "up_proj", "×"]


def test_what_is_hidden_between_is_a_dotted_edge(llama) -> None:
    picture = build(
        llama.before(), unfold=True, focus=lambda path: bool(re.fullmatch(r"model\.layers\.[02]\.mlp", path))
    )
    by_id = {node.id: node for node in picture.nodes}
    through = [(by_id[e.source].module, by_id[e.target].module) for e in picture.edges if e.kind == "through"]
    assert ("model.layers.0", "model.layers.2.post_attention_layernorm") in through


def test_layers_fold_under_a_focus(llama) -> None:
    picture = build(llama.after("alike"), focus=lambda path: path.endswith("q_proj"))
    assert [cluster.fold.count for cluster in picture.clusters if cluster.fold] == [4]


def test_a_focus_on_nothing_is_empty(llama) -> None:
    picture = build(llama.before(), focus=lambda path: False)
    assert (picture.nodes, picture.edges, picture.clusters) == ((), (), ())
