import pytest
import torch
from torch.testing import assert_close

from peftc.grammar.algebra import algebra as al
from peftc.grammar.method.bind import Place, bind, stacked_axis
from peftc.grammar.method.check import check_method
from peftc.grammar.source import Source
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax.parse import parse
from peftc.passes.expression.materialise import Evaluator, restack, to_logical, to_stored, unstack
from peftc.passes.expression.scene import Eager
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.plan.site import Site

aten = torch.ops.aten
LINEAR = Site("m", "weight", "linear", 4, 5)
CONV1D = Site("m", "weight", "conv1d", 4, 5, transposed=True)
STACK = Site("m", "stack", "parameter", 4, 5, count=3)


def materialise(matrix, ops, weight, params, scalars, lead=0):
    return Evaluator(ops, params, scalars, weight=None if weight is None else lambda: weight, lead=lead).of(matrix)


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
    got = materialise(matrix, Eager(), w, {"A": a, "B": b}, {}, lead=1)
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
    assert_close(unstack(Eager(), a, 0, False, STACK), torch.stack(a.split(2)))


def test_unstack_experts_last():
    b = torch.randn(4, 2 * 3)
    apart = unstack(Eager(), b, 1, False, STACK)
    assert apart.shape == (3, 4, 2)
    for expert in range(3):
        assert_close(apart[expert], b[:, expert::3])


def test_unstack_is_nothing_elsewhere():
    a = torch.randn(2, 5)
    assert unstack(Eager(), a, 0, False, LINEAR) is a


def test_unstack_what_has_an_axis_for_the_experts():
    v = torch.randn(3, 5)
    assert unstack(Eager(), v, None, False, STACK) is v


def test_unstack_what_is_shared_has_one_leading_row():
    v = torch.randn(3, 5)
    assert torch.equal(unstack(Eager(), v, 0, True, STACK), v[None])
    assert unstack(Eager(), v, 0, True, LINEAR) is v


@pytest.mark.parametrize(("axis", "shape"), [(0, (6, 5)), (1, (4, 6)), (None, (3, 4, 5))])
def test_restack_is_the_inverse(axis, shape):
    stored = torch.randn(shape)
    apart = unstack(Eager(), stored, axis, False, STACK)
    assert len(apart) == 3
    assert torch.equal(restack(apart, axis, STACK).reshape(shape), stored)


RULES = {
    "low rank": 'param A[2, in] = zeros saved "A" param B[out, 2] = zeros saved "B" W\' = W + 3 * (B @ A)',
    "vectors": 'param v[in] = ones saved "v" param u[out, 1] = ones saved "u" W\' = u * W * v + 1',
    "norms": 'param m[out] = ones saved "m" W\' = reshape(m, [out, 1]) / norm(W, 1) * W',
    "turned": 'param R[1, out * (out - 1) // 2] = zeros saved "R" W\' = cayley(reshape(skew(R, out), [out, out])) @ W',
    "reflected": 'param v[out, 1] = ones saved "v" W\' = (eye(out) - 2 / sum(v * v, 0) * (v @ v.T)) @ W',
    "blocks": 'param C[2, out // 2, out // 2] = ones saved "C" W\' = block_diag(C) @ W',
    "kron": 'param C[2, 1] = ones saved "C" shared param D[out // 2, in] = ones saved "D" W\' = W + kron(C, D)',
    "shared rows": 'shared param D[9, in] = ones saved "D" const i[out] = randperm(9) seeded 0 W\' = W + gather(D, i)',
    "own rows": 'param D[9, 1, in] = ones saved "D" const i[out] = randperm(9) seeded 0 '
    "W' = W * reshape(gather(D, i), [out, in])",
    "scattered": 'shared param s[3] = ones saved "s" const i[3] = randperm(20) seeded 0 '
    "W' = W - scatter(s, i, [out, in])",
    "beside": 'shared param C[out, 2] = ones saved "C" param D[out, in - 2] = ones saved "D" W\' = W - concat(C, D, 1)',
    "singular": 'param d[3] = zeros saved "d" '
    "W' = W + left_singular(W, 3) * (singular_values(W, 3) * d) @ right_singular(W, 3)",
}


@pytest.mark.parametrize("name", RULES)
def test_a_stack_is_each_expert_alone(name):
    (method,) = parse(Source("x", f"method m() {{ on linear, parameter {RULES[name]} }}")).statements
    rule = check_method(method)
    stack = bind(rule, complete(rule, ()), Place("parameter", 4, 5, count=3))
    alone = bind(rule, complete(rule, ()), Place("linear", 4, 5))
    assert stack.weight == alone.weight
    weights, tensors = torch.randn(3, 4, 5), {}
    for each, defined in zip(stack.params, rule.params, strict=True):
        stored = torch.randint(9, each.shape) if each.role == "i" else torch.randn(each.shape)
        tensors[each.role] = unstack(Eager(), stored, stacked_axis(defined), each.shared, STACK)
    got = materialise(stack.weight, Eager(), weights, tensors, dict(stack.scalars), lead=1)
    for expert in range(3):
        own = {each.role: tensors[each.role][0 if each.shared else expert] for each in stack.params}
        assert {role: tuple(each.shape) for role, each in own.items()} == {e.role: e.shape for e in alone.params}
        assert_close(got[expert], materialise(alone.weight, Eager(), weights[expert], own, dict(alone.scalars)))
    with pytest.raises(AssertionError):
        assert_close(got, weights)
