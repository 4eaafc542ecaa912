"""A difference shows what was added, what was removed, and nothing else as changed."""

from peftc.compiler.diagram import build, diff


def test_nothing_changed(llama) -> None:
    picture = diff(llama.before(), llama.before())
    assert {node.status for node in picture.nodes} == {"kept"}
    assert picture == build(llama.before())


def test_adapters_and_sums_are_added(llama) -> None:
    picture = diff(llama.before(), llama.after("alike"))
    added = {node.kind for node in picture.nodes if node.status == "added"}
    assert added == {"adapter", "join"}
    assert all(node.status == "added" for node in picture.nodes if node.kind in added)
    assert not [node for node in picture.nodes if node.status == "removed"]


def test_edges_that_were_parted_are_removed(llama) -> None:
    picture = diff(llama.before(), llama.after("alike"), unfold=True)
    modules = {node.id: node.title for node in picture.nodes if node.module.startswith("model.layers.0")}
    removed = {
        (modules[e.source], modules[e.target]) for e in picture.edges if e.kind == "removed" and e.source in modules
    }
    assert removed == {("q_proj", "rotate"), ("v_proj", "attention")}


def test_a_weight_that_is_read_no_more_is_struck(llama) -> None:
    picture = diff(llama.before(), llama.after("head"))
    (head,) = [node for node in picture.nodes if node.title == "lm_head"]
    assert [(weight.name, weight.status) for weight in head.weights] == [("lm_head.weight", "removed")]


def test_an_operator_that_is_gone_is_struck(llama) -> None:
    picture = diff(llama.after("alike"), llama.before())
    removed = {node.kind for node in picture.nodes if node.status == "removed"}
    assert removed == {"adapter", "join"}
    assert not [node for node in picture.nodes if node.status == "added"]
    assert len({node.id for node in picture.nodes}) == len(picture.nodes)


def test_a_difference_folds(llama) -> None:
    picture = diff(llama.before(), llama.after("alike"))
    assert [cluster.fold.count for cluster in picture.clusters if cluster.fold] == [4]
