"""apply(E, x) = linear(x, materialise(E)), for every E the algebra can say."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.testing import assert_close

from peftc.grammar.algebra import algebra as al
from peftc.passes.expression.apply import Apply, Dense, OneHot, compose, deltas, renamed
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.expression.scene import Eager
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.plan.site import Site

aten = torch.ops.aten
OUT, IN = 4, 5
SIZES = (2, 3, OUT, IN)
SITE = Site("m", "weight", "linear", OUT, IN)


@dataclass(frozen=True)
class Case:
    """An expression of shape [OUT, IN] and the shapes of its parameters."""

    matrix: al.Matrix
    shapes: tuple[tuple[str, tuple[int, int]], ...]


@st.composite
def cases(draw, with_weight=True):
    shapes: dict[str, tuple[int, int]] = {}

    def param(rows: int, columns: int) -> al.Matrix:
        same = [name for name, shape in shapes.items() if shape == (rows, columns)]
        if same and draw(st.booleans()):
            return al.Param(draw(st.sampled_from(same)))
        role = f"P{len(shapes)}"
        shapes[role] = (rows, columns)
        return al.Param(role)

    def matrix(rows: int, columns: int, depth: int) -> al.Matrix:
        kinds = ["param"]
        if with_weight and (rows, columns) == (OUT, IN):
            kinds.append("weight")
        if with_weight and (rows, columns) == (IN, OUT):
            kinds.append("weight transposed")
        if depth:
            kinds += ["sum", "product", "scaled", "transposed", "hadamard", "dropped"]
        match draw(st.sampled_from(kinds)):
            case "weight":
                return al.Weight()
            case "weight transposed":
                return al.Transposed(al.Weight())
            case "sum":
                return al.Sum(matrix(rows, columns, depth - 1), matrix(rows, columns, depth - 1))
            case "hadamard":
                return al.Hadamard(matrix(rows, columns, depth - 1), matrix(rows, columns, depth - 1))
            case "product":
                inner = draw(st.sampled_from(SIZES))
                return al.Product(matrix(rows, inner, depth - 1), matrix(inner, columns, depth - 1))
            case "scaled":
                return al.Scaled(draw(st.sampled_from(("s", "t"))), matrix(rows, columns, depth - 1))
            case "transposed":
                return al.Transposed(matrix(columns, rows, depth - 1))
            case "dropped":
                return al.Dropped(matrix(rows, columns, depth - 1), 0.5)
            case _:
                return param(rows, columns)

    found = matrix(OUT, IN, draw(st.integers(0, 3)))
    return Case(found, tuple(shapes.items()))


def lowered(lab, case, x, training=False):
    """A graph of the expression met by `x` (floats: dense, whole numbers: one-hot); its tensors in double precision."""
    hand = lab.hand()
    attributes = {"W": hand.attribute("W", OUT, IN, dtype=torch.float64)}
    for role, shape in case.shapes:
        attributes[role] = hand.attribute(role, *shape, dtype=torch.float64)
    scalars = {name: hand.attribute(name, dtype=torch.float64) for name in ("s", "t")}
    given = hand.placeholder("x", *x.shape, dtype=x.dtype)
    # Emit appends before a node: something stands where the output will be.
    end = hand.call(aten.relu.default, given)
    emit = Emit(hand.graph, end, Origin("test"), like=given)
    apply = applied(emit, attributes, scalars, lambda: attributes["W"], training)
    activation = Dense(given) if x.is_floating_point() else OneHot(given, ())
    graph = hand.done(apply(case.matrix, activation))
    graph.lint()
    return graph


def applied(emit, params, scalars, weight, training=False):
    """The laws at a plain weight."""

    def base(x):
        if isinstance(x, OneHot):
            return emit.call(aten.embedding.default, emit.call(aten.transpose.int, weight(), -1, -2), x.ids)
        return emit.call(aten.linear.default, x.node, weight())

    values = Evaluator(emit, params, scalars, weight=weight)
    sizes = {name: tuple(each.meta["val"].shape) for name, each in params.items()}
    return Apply(emit, values, base, sizes, (OUT, IN), SITE, training)


def tensors_of(case):
    generator = torch.Generator().manual_seed(1)
    shapes = {"W": (OUT, IN), **dict(case.shapes)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made |= {"s": torch.tensor(0.5, dtype=torch.float64), "t": torch.tensor(-2.0, dtype=torch.float64)}
    return {name: each.requires_grad_() for name, each in made.items()}


def compare(lab, case, x, graph):
    """Outputs and the gradients of everything they depend on."""
    tensors = tensors_of(case)
    got = lab.run(graph, tensors, x)
    value = Evaluator(Eager(), tensors, tensors, weight=lambda: tensors["W"]).of(case.matrix)
    expected = torch.nn.functional.linear(x, value) if x.is_floating_point() else value.T[x]
    assert_close(got, expected)
    wanted = [*tensors.values(), *([x] if x.is_floating_point() else [])]
    weights = torch.arange(1.0, got.numel() + 1, dtype=torch.float64).reshape(got.shape)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), wanted, allow_unused=True) for each in (got, expected))
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            assert_close(mine, reference)


LAW = settings(max_examples=120, deadline=None, derandomize=True)


@given(case=cases())
@LAW
def test_dense(lab_of_all, case):
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    compare(lab_of_all, case, x, lowered(lab_of_all, case, x))


@given(case=cases())
@LAW
def test_one_hot(lab_of_all, case):
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    compare(lab_of_all, case, ids, lowered(lab_of_all, case, ids))


@given(case=cases())
@LAW
def test_dropout_does_nothing_to_rows_of_the_identity(lab_of_all, case):
    ids = torch.tensor([0, 4, 2])
    compare(lab_of_all, case, ids, lowered(lab_of_all, Case(_pushed(case.matrix), case.shapes), ids, training=False))


def _pushed(matrix):
    """Without its dropouts, which is what a merged or one-hot site sees."""
    if isinstance(matrix, al.Dropped):
        return _pushed(matrix.operand)
    return al.rebuild(matrix, _pushed)


def test_the_comparison_can_fail(lab):
    case = Case(al.Product(al.Param("B"), al.Param("A")), (("B", (OUT, 2)), ("A", (2, IN))))
    wrong = Case(al.Scaled("s", case.matrix), case.shapes)
    x = torch.randn(3, IN, dtype=torch.float64).requires_grad_()
    with pytest.raises(AssertionError):
        compare(lab, case, x, lowered(lab, wrong, x))


LORA = Case(
    al.Scaled("s", al.Product(al.Param("B"), al.Dropped(al.Param("A"), 0.5))), (("B", (OUT, 2)), ("A", (2, IN)))
)


def calls(graph):
    return [node.target for node in graph.nodes if node.op == "call_function" and "peftc" in node.meta]


def test_a_low_rank_term_never_makes_the_weight(lab):
    """The scale meets the activation where it is smallest, between the two."""
    x = torch.randn(3, IN, dtype=torch.float64)
    assert calls(lowered(lab, LORA, x)) == [aten.linear.default, aten.mul.Tensor, aten.linear.default]


def test_dropout_meets_the_activation_while_training(lab):
    x = torch.ones(3, IN, dtype=torch.float64)
    graph = lowered(lab, LORA, x, training=True)
    assert calls(graph) == [aten.dropout.default, aten.linear.default, aten.mul.Tensor, aten.linear.default]
    tensors = tensors_of(LORA)
    got = lab.run(graph, tensors, x)
    torch.manual_seed(4)
    dropped = torch.dropout(x, 0.5, True)
    torch.manual_seed(4)
    assert_close(lab.run(graph, tensors, x), dropped @ (0.5 * tensors["B"] @ tensors["A"]).T)
    assert not torch.allclose(got, lab.run(graph, tensors, x))


def test_the_weight_is_asked_for_only_where_it_is_needed(lab):
    def refuse() -> fx.Node:
        raise AssertionError("W was asked for")

    hand = lab.hand()
    x = hand.placeholder("x", 3, IN)
    params = {"A": hand.attribute("A", 2, IN), "B": hand.attribute("B", OUT, 2), "C": hand.attribute("C", OUT, IN)}
    emit = Emit(hand.graph, hand.call(aten.relu.default, x), Origin("test"), like=x)
    apply = applied(emit, params, {}, refuse)
    apply(al.Sum(al.Product(al.Param("B"), al.Param("A")), al.Hadamard(al.Param("C"), al.Param("C"))), Dense(x))
    with pytest.raises(AssertionError, match="W was asked for"):
        apply(al.Hadamard(al.Weight(), al.Param("C")), Dense(x))


def test_an_adapter_computes_in_its_own_type(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 3, IN, dtype=torch.bfloat16)
    params = {"A": hand.attribute("A", 2, IN)}
    emit = Emit(hand.graph, hand.call(aten.relu.default, x), Origin("test"), like=x)
    result = applied(emit, params, {}, lambda: x)(al.Param("A"), Dense(x))
    assert result.meta["val"].dtype == torch.float32


def test_compose_puts_what_came_before_in_place_of_the_weight():
    first = al.Sum(al.Weight(), al.Param("D"))
    second = al.Sum(al.Weight(), al.Hadamard(al.Weight(), al.Param("E")))
    weight, bias = compose(((first, None), (second, al.Scaled("s", al.Bias())), (al.Weight(), al.Bias())))
    assert al.text(weight) == "W + D + (W + D) * E"
    assert al.text(bias) == "s * b"
    assert compose(()) == (al.Weight(), None)


def test_a_bias_that_one_adapter_brings_is_there_for_the_next():
    brings, doubles = al.Sum(al.Bias(), al.Param("c")), al.Scaled("s", al.Bias())
    adapters = [(al.Weight(), each) for each in (doubles, brings, doubles, brings)]
    assert al.text(compose(adapters, has_bias=False)[1]) == "s * c + c"
    assert al.text(compose(adapters, has_bias=True)[1]) == "s * (s * b + c) + c"
    assert compose(adapters[:1], has_bias=False)[1] is None


def test_deltas():
    d, e = al.Param("D"), al.Scaled("s", al.Param("E"))
    assert deltas(al.Sum(al.Sum(al.Weight(), d), e)) == (d, e)
    assert deltas(al.Sum(d, al.Sum(e, al.Weight()))) == (d, e)
    assert deltas(al.Weight()) == ()
    assert deltas(al.Hadamard(al.Weight(), d)) is None
    assert deltas(al.Scaled("s", al.Sum(al.Weight(), d))) is None


@given(case=cases())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_renamed(case):
    prefixed = renamed(case.matrix, "1:")
    names = {each.role for each in al.walk(prefixed) if isinstance(each, al.Param)}
    names |= {each.scalar for each in al.walk(prefixed) if isinstance(each, al.Scaled)}
    assert all(each.startswith("1:") for each in names)
    assert al.text(prefixed).replace("1:", "") == al.text(case.matrix)
