import pytest
import torch
from torch.testing import assert_close

from peftc.passes.export.route import route
from peftc.passes.ir.inputs import InputSpec
from peftc.passes.ir.roles import Role
from peftc.passes.route.laws import UnroutedError
from tests.passes.export.lifted import X, dtype_of, lifted, operators, run

aten = torch.ops.aten
IDS = torch.tensor([2, 0, 1, 2])
TOKENS = InputSpec("ids", Role.TOKENS, axes=(("batch",), ("sequence",)))
TASKS = InputSpec("tasks", Role.TASKS, axes=(("batch",),))
FLAT = InputSpec("x", axes=(("batch",), 4))


def linear(call, inputs, held):
    return call(aten.linear.default, (inputs[0], held["v"], held["b"]))


def added(call, inputs, held):
    return call(aten.add.Tensor, (call(aten.mul.Tensor, (inputs[0], held["v"])), held["b"]))


def matmul(call, inputs, held):
    return call(aten.matmul.default, (inputs[0], held["v"]))


def folded(call, inputs, held):
    """As GPT-2: rows and tokens are one axis."""
    (x,) = inputs
    sizes = [call(aten.sym_size.int, (x, axis)) for axis in (0, 1)]
    flat = call(aten.flatten.using_ints, (x, 0, 1))
    made = call(aten.addmm.default, (held["b"], flat, held["v"]))
    return call(aten.reshape.default, (made, [*sizes, 3]))


def einsum(call, inputs, held):
    return call(aten.einsum.default, ("...i,io->...o", [inputs[0], held["v"]]))


def norm(call, inputs, held):
    return call(aten.layer_norm.default, (inputs[0], [4], held["v"], held["b"], 1e-5))


def looked_up(call, inputs, held):
    return call(aten.embedding.default, (held["v"], inputs[0]))


def picked(call, inputs, held):
    return call(aten.index_select.default, (held["v"], 0, inputs[0]))


def expanded(call, inputs, held):
    rows = call(aten.sym_size.int, (inputs[0], 0))
    return call(aten.expand.default, (call(aten.unsqueeze.default, (held["v"], 0)), [rows, -1, -1]))


def repeated(call, inputs, held):
    return call(aten.repeat.default, (held["v"], [call(aten.sym_size.int, (inputs[0], 0)), 1]))


def delta(call, inputs, held):
    """x (W + B A)^T: the product is made once for each adapter."""
    whole = call(aten.add.Tensor, (held["weight"], call(aten.mm.default, (held["v"], held["b"]))))
    return call(aten.linear.default, (inputs[0], whole))


# A graph, the sizes of an adapter's v and b, and the input.
LAWS = {
    "linear": (linear, (3, 4), (3,), X),
    "linear of rows": (linear, (3, 4), (3,), FLAT),
    "elementwise": (added, (4,), (5, 1), InputSpec("x", axes=(("batch",), 5, 4))),
    "matmul": (matmul, (4, 3), None, X),
    "addmm, rows and tokens as one": (folded, (4, 3), (3,), X),
    "einsum": (einsum, (4, 3), None, X),
    "layer_norm": (norm, (4,), (4,), X),
    "embedding": (looked_up, (9, 4), None, TOKENS),
    "index_select": (picked, (9, 4), None, TASKS),
    "expand": (expanded, (2, 4), None, X),
    "repeat": (repeated, (2, 4), None, X),
    "computed first": (delta, (6, 2), (2, 4), X),
}


def adapters(v, b):
    torch.manual_seed(0)
    return [{"v": torch.randn(v), **({"b": torch.randn(b)} if b else {})} for _ in range(3)]


def sample(given):
    sizes = [{"batch": len(IDS), "sequence": 5}[each[0]] if isinstance(each, tuple) else each for each in given.axes]
    return torch.randint(0, 9, sizes) if dtype_of(given) == torch.int64 else torch.randn(sizes)


def routed(law, values, given):
    weight = {"weight": torch.ones(6, 4)} if law is delta else {}
    made = lifted(law, {**values[0], **weight}, given)
    slots = {name: node for node, name in made.names.items() if name != "weight"}
    bank = [{slots[name]: value for name, value in each.items()} for each in values]
    route(made, frozenset(slots.values()), bank, "adapter_ids")
    return made


@pytest.mark.parametrize("name", LAWS)
def test_each_row_has_its_own(name):
    law, v, b, given = LAWS[name]
    values = adapters(v, b)
    weight = {"weight": torch.ones(6, 4)} if law is delta else {}
    x = sample(given)
    alone = [run(lifted(law, {**each, **weight}, given), x) for each in values]
    rows = len(alone[0]) // len(IDS)
    own = [alone[which][rows * row : rows * (row + 1)] for row, which in enumerate(IDS.tolist())]
    made = routed(law, values, given)
    assert list(made.inputs)[-1] == "adapter_ids"
    found = run(made, x, IDS)
    assert_close(found, torch.cat(own))
    with pytest.raises(AssertionError):
        assert_close(found, alone[0])


def test_what_is_one_for_all_is_no_bank():
    """A scale that every adapter has is a constant; so a bank holds what differs."""
    values = adapters((4,), (5, 1))
    for each in values:
        each["b"] = values[0]["b"]
    made = routed(added, values, LAWS["elementwise"][3])
    assert sorted(name.partition(".")[0] for name in made.names.values()) == ["bank", "folded"]


def test_what_adapters_make_is_made_once():
    made = routed(delta, adapters((6, 2), (2, 4)), X)
    assert "aten.mm.default" not in operators(made)
    assert [sorted(each.shape) for each in made.tensors.values()] == [[3, 4, 6]]


def larger(call, inputs, held):
    return call(aten.maximum.default, (inputs[0], held["v"]))


def from_the_left(call, inputs, held):
    return call(aten.matmul.default, (held["v"], inputs[0]))


def stretched(call, inputs, held):
    tokens = call(aten.sym_size.int, (inputs[0], 1))
    return call(aten.add.Tensor, (call(aten.expand.default, (held["v"], [tokens, -1])), inputs[0]))


REFUSED = {
    "no law": (larger, (4,), X, "aten.maximum.default has no form"),
    "from the left": (from_the_left, (5, 5), InputSpec("x", axes=(("batch",), 5, 4)), "from the left"),
    "over no rows": (stretched, (1, 4), X, "something else than rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    law, v, given, reason = REFUSED[name]

    with pytest.raises(UnroutedError, match=reason):
        routed(law, adapters(v, None), given)


def test_adapters_of_other_sizes_are_refused():
    with pytest.raises(UnroutedError, match="different sizes"):
        routed(added, [*adapters((4,), (5, 1)), *adapters((4,), (1, 1))], LAWS["elementwise"][3])
