import pytest
import torch
from torch.testing import assert_close

from peftc.passes.export.bank_pieces import pieces_of
from peftc.passes.export.fold import computed
from peftc.passes.export.route import Route
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


def routed(law, values, given, **options):
    """The graph with a bank as input, and that bank; its first is the base's with `base`, which has zeros."""
    weight = {"weight": torch.ones(6, 4)} if law is delta else {}
    made = lifted(law, {**values[0], **weight}, given)
    slots = {name: name for name in made.names.values() if name != "weight"}
    constants = options.pop("constants", frozenset())
    pieces = [each for each in pieces_of(made, slots) if not each.reads <= constants]
    nodes = {name: node for node, name in made.names.items()}
    rows = [{nodes[name]: value for name, value in each.items()} for each in values]
    found = list(computed(made, rows, {each.node: None for each in pieces}))
    bank = {each.name: torch.stack([own[each.node] for own in found]) for each in pieces}
    if options.get("base"):
        bank = {name: torch.cat([torch.zeros_like(value[:1]), value]) for name, value in bank.items()}
    Route(slots, constants, "adapter_ids", {name: value.shape[1:] for name, value in bank.items()}, **options).run(made)
    return made, bank


def given_bank(bank, turned=()):
    return [value.transpose(1, 2) if name in turned else value for name, value in bank.items()]


@pytest.mark.parametrize("name", LAWS)
def test_each_row_has_its_own(name):
    law, v, b, given = LAWS[name]
    values = adapters(v, b)
    weight = {"weight": torch.ones(6, 4)} if law is delta else {}
    x = sample(given)
    alone = [run(lifted(law, {**each, **weight}, given), x) for each in values]
    rows = len(alone[0]) // len(IDS)
    own = [alone[which][rows * row : rows * (row + 1)] for row, which in enumerate(IDS.tolist())]
    made, bank = routed(law, values, given)
    assert [*made.inputs][1:] == ["adapter_ids", *(f"bank.{each}" for each in bank)]
    found = run(made, x, IDS, *given_bank(bank))
    assert_close(found, torch.cat(own))
    with pytest.raises(AssertionError):
        assert_close(found, alone[0])


def test_what_is_one_for_all_is_no_bank():
    """A constant that every adapter has stays in the program."""
    values = adapters((4,), (5, 1))
    for each in values:
        each["b"] = values[0]["b"]
    law, _, _, given = LAWS["elementwise"]
    made, bank = routed(law, values, given, constants=frozenset("b"))
    assert list(bank) == ["v"]
    assert list(made.names.values()) == ["b"]
    x = sample(given)
    found = run(made, x, IDS, *given_bank(bank))
    assert_close(found, torch.cat([x[i : i + 1] * values[which]["v"] + values[0]["b"] for i, which in enumerate(IDS)]))


def test_what_adapters_make_is_made_once():
    made, bank = routed(delta, adapters((6, 2), (2, 4)), X)
    assert "aten.mm.default" not in operators(made)
    assert [each.shape for each in bank.values()] == [(3, 6, 4)]


def test_rows_of_the_base_have_the_first():
    """-1 is in front of the adapters, whose numbers stay what they are."""
    law, v, _, given = LAWS["matmul"]
    values = adapters(v, None)
    made, bank = routed(law, values, given, base=True)
    x, ids = sample(given), torch.tensor([-1, 0, 2, -1])
    wanted = torch.stack([x[row] @ values[which]["v"] * (which >= 0) for row, which in enumerate(ids)])
    assert_close(run(made, x, ids, *given_bank(bank)), wanted)


def test_a_bank_can_be_turned():
    law, v, b, given = LAWS["linear"]
    values = adapters(v, b)
    straight, bank = routed(law, values, given)
    turned, _ = routed(law, values, given, turned=frozenset("v"))
    assert turned.inputs["bank.v"].meta["val"].shape[1:] == (4, 3)
    x = sample(given)
    assert_close(run(turned, x, IDS, *given_bank(bank, "v")), run(straight, x, IDS, *given_bank(bank)))


def twice(call, inputs, held):
    """As a module that is called twice: what its adapter makes is computed at each call."""
    made = inputs[0]
    for _ in range(2):
        made = call(aten.matmul.default, (made, call(aten.mul.Tensor, (held["v"], 2.0))))
    return made


def test_what_is_computed_twice_is_one_input():
    values = adapters((4, 4), None)
    made, bank = routed(twice, values, X)
    assert len([*made.inputs]) == 3
    x = sample(X)
    wanted = torch.stack(
        [row @ (2 * values[which]["v"]) @ (2 * values[which]["v"]) for row, which in zip(x, IDS, strict=True)]
    )
    assert_close(run(made, x, IDS, *given_bank(bank)), wanted)


def test_any_number_of_adapters():
    law, v, b, given = LAWS["linear"]
    made, bank = routed(law, adapters(v, b), given)
    more = {name: torch.cat([value, value.neg()]) for name, value in bank.items()}
    x = sample(given)
    assert_close(run(made, x, IDS + 3, *given_bank(more)), -run(made, x, IDS, *given_bank(bank)))


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
