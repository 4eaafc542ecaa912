import torch
from torch.testing import assert_close

from peftc.grammar import algebra as al
from peftc.passes.emit import Emit, Origin
from peftc.passes.materialise import Eager, materialise, to_logical, to_stored, unstack
from peftc.passes.site import Site

aten = torch.ops.aten
LINEAR = Site("m", "weight", "linear", 4, 5)
CONV1D = Site("m", "weight", "conv1d", 4, 5, transposed=True)
STACK = Site("m", "stack", "parameter", 4, 5, count=3)


def test_every_operator_by_hand():
    w, p, q = torch.randn(4, 5), torch.randn(4, 5), torch.randn(5, 5)
    params = {"P": p, "Q": q}
    matrix = al.Sum(
        al.Hadamard(al.Weight(), al.Dropped(al.Param("P"), 0.9)),
        al.Scaled("s", al.Product(al.Weight(), al.Transposed(al.Param("Q")))),
    )
    assert_close(materialise(matrix, Eager(), w, params, {"s": 0.5}), w * p + 0.5 * w @ q.T)


def test_an_expression_without_the_weight_does_not_need_it():
    p = torch.randn(4, 5)
    assert materialise(al.Param("P"), Eager(), None, {"P": p}, {}) is p


def test_over_a_stack_of_experts():
    w, a, b = torch.randn(3, 4, 5), torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    matrix = al.Sum(al.Weight(), al.Product(al.Param("B"), al.Param("A")))
    got = materialise(matrix, Eager(), w, {"A": a, "B": b}, {})
    for expert in range(3):
        assert_close(got[expert], w[expert] + b[expert] @ a[expert])


def test_at_once_and_as_nodes_agree(lab):
    matrix = al.Sum(al.Weight(), al.Scaled("s", al.Product(al.Param("B"), al.Param("A"))))
    tensors = {"W": torch.randn(4, 5), "A": torch.randn(2, 5), "B": torch.randn(4, 2), "s": torch.tensor(3.0)}
    hand = lab.hand()
    nodes = {name: hand.attribute(name, *each.shape) for name, each in tensors.items()}
    end = hand.call(aten.relu.default, nodes["W"])
    emit = Emit(hand.graph, end, Origin("test"), like=end)
    graph = hand.done(materialise(matrix, emit, nodes["W"], nodes, nodes))
    expected = materialise(matrix, Eager(), tensors["W"], tensors, tensors)
    assert torch.equal(lab.run(graph, tensors), expected)
    assert not torch.allclose(expected, tensors["W"])


def test_a_transposed_weight_goes_and_comes_back():
    stored = torch.randn(5, 4)
    assert to_logical(Eager(), stored, CONV1D).shape == (4, 5)
    assert torch.equal(to_stored(Eager(), to_logical(Eager(), stored, CONV1D), CONV1D), stored)
    assert to_logical(Eager(), stored, LINEAR) is stored


def test_unstack_experts_first():
    a = torch.randn(3 * 2, 5)
    assert_close(unstack(Eager(), a, 0, (6, 5), STACK), torch.stack(a.split(2)))


def test_unstack_experts_last():
    b = torch.randn(4, 2 * 3)
    apart = unstack(Eager(), b, 1, (4, 6), STACK)
    assert apart.shape == (3, 4, 2)
    for expert in range(3):
        assert_close(apart[expert], b[:, expert::3])


def test_unstack_is_nothing_elsewhere():
    a = torch.randn(2, 5)
    assert unstack(Eager(), a, 0, (2, 5), LINEAR) is a
