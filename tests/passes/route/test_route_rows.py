import pytest
import torch
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import InsertDelta, UnfitError
from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.plan.by_row import by_row
from peftc.passes.plan.structure import site_slot
from peftc.passes.route.laws import UnroutedError
from peftc.passes.route.route_rows import IDS, ROUTED, RouteRows, draws_numbers
from tests.passes.conftest import _Evaluate

aten = torch.ops.aten
LOW = "adapter a = lora(rank = 2, alpha = 6) { on first, second }"
OTHER = "adapter a = lora(rank = 2) { on first, second }"
SCALED = "adapter a = ia3 { on second }"
TURNED = "adapter a = oft(block = 2) { on first }"
NORMED = "adapter a = dora(rank = 2) { on first }"


class Mixed:
    """Several adapters of a model in one graph."""

    def __init__(self, lab, name, *specs, training=False):
        self.lab, self.name = lab, name
        self.choices = [lab.active(name, each) for each in specs]
        self.shared = by_row([each.structure for each in self.choices])
        self.graph, self.route = lab.graph(name), RouteRows()
        insert = InsertDelta(self.shared.structure, self._slot_value, training)
        self.changes = pass_manager.run(self.graph, [Clean(), insert, self.route], full=True).changes

    def _slot_value(self, position, site, role, near):
        slot = site_slot(position, site)
        number, own = next((number, each[slot]) for number, each in enumerate(self.shared.owners) if slot in each)
        return self.choices[number].slot_value(int(own[len("slots.p")]), site, role, near)

    def run(self, rows, *inputs):
        """What the graph gives where row i has choice `rows[i]`, or None."""
        tensors = dict(self.lab.tensors(self.name))
        present = list(dict.fromkeys(rows))
        tensors[f"{ROUTED}.{IDS}"] = torch.tensor([present.index(each) for each in rows])
        for lane in self.route.lanes:
            made = {each: self._values(lane, each) for each in present if self._has(each, lane)}
            for piece in lane.pieces:
                values = {each: value[piece.index] for each, value in made.items()}
                first = next(iter(values.values()))
                filled = [values.get(each, first if lane.guarded else torch.zeros_like(first)) for each in present]
                if piece.form == "matrix":
                    filled = [each.mT for each in filled]
                whole = (
                    torch.stack(filled)
                    if piece.form == "tables"
                    else torch.stack([filled[present.index(each)] for each in rows])
                )
                tensors[f"{ROUTED}.{piece.name}"] = whole
            for name in lane.members:
                tensors[f"{ROUTED}.{name}"] = torch.tensor([each in made for each in rows])
        return self.lab.run(self.graph, tensors, *inputs)

    def alone(self, choice, *inputs):
        active, graph = self.choices[choice], self.lab.graph(self.name)
        pass_manager.run(graph, [Clean(), InsertDelta(active.structure, active.slot_value, False)])
        return self.lab.run(graph, {**self.lab.tensors(self.name), **active.tensors}, *inputs)

    def _has(self, choice, lane):
        return choice is not None and lane.slots <= set(self.shared.owners[choice])

    def _values(self, lane, choice):
        tensors, owners = dict(self.lab.tensors(self.name)), self.shared.owners[choice]
        for slot in lane.slots:
            own = owners[slot]
            held = {path: value for path, value in self.choices[choice].tensors.items() if path.startswith(f"{own}.")}
            tensors |= {f"{slot}{path[len(own) :]}": value for path, value in held.items()}
        return _Evaluate(lane.prologue, tensors).run()


def operators(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "specs",
    [(LOW, OTHER), (LOW, SCALED), (LOW, TURNED), (NORMED, LOW, SCALED, TURNED)],
    ids=lambda each: f"{len(each)} {each[1][12:20]}",
)
def test_rows_are_as_they_are_alone(specs, lab):
    mixed = Mixed(lab, "Two", *specs)
    x = torch.randn(len(specs) + 2, 5, 4)
    rows = [*range(len(specs)), None, 0]
    found = mixed.run(rows, x)
    for row, choice in enumerate(rows):
        alone = x[row : row + 1]
        wanted = lab.model("Two")(alone) if choice is None else mixed.alone(choice, alone)
        assert_close(found[row : row + 1], wanted, atol=1e-5, rtol=1e-5)


def test_low_rank_needs_no_telling_apart(lab):
    """Rows without a lane add zeros, and a scale is part of what is laid out."""
    mixed = Mixed(lab, "Two", LOW, OTHER)
    made = operators(mixed.graph)
    assert "aten.where.self" not in made
    assert "aten.mul.Tensor" not in made
    assert made.count("aten.bmm.default") == 4
    assert not any(lane.guarded for lane in mixed.route.lanes)


def test_others_are_told_apart(lab):
    mixed = Mixed(lab, "Two", LOW, SCALED)
    assert operators(mixed.graph).count("aten.where.self") == 1
    assert [lane.guarded for lane in mixed.route.lanes].count(True) == 1


def test_running_twice_changes_nothing(lab):
    mixed = Mixed(lab, "Two", LOW, SCALED)
    before = lab.show(mixed.graph)
    again = RouteRows()
    again.run(mixed.graph)
    assert lab.show(mixed.graph) == before
    assert again.lanes == []


def test_a_table_is_looked_up_where_it_lies(lab):
    mixed = Mixed(
        lab, "Lookup", "adapter a = lora(rank = 2) { on embed, conv }", "adapter a = lora(rank = 2) { on embed }"
    )
    ids = torch.randint(0, 7, (4, 5))
    rows = [1, 0, None, 1]
    found = mixed.run(rows, ids)
    for row, choice in enumerate(rows):
        alone = ids[row : row + 1]
        wanted = lab.model("Lookup")(alone) if choice is None else mixed.alone(choice, alone)
        assert_close(found[row : row + 1], wanted, atol=1e-5, rtol=1e-5)
    assert {piece.form for lane in mixed.route.lanes for piece in lane.pieces} == {"matrix", "tables"}


def test_a_weight_that_is_used_otherwise_is_refused(lab):
    with pytest.raises(UnfitError, match="rows have adapters of their own"):
        Mixed(lab, "Experts", "adapter a = lora(rank = 2) { on stack }")


def test_an_operator_that_mixes_rows_is_refused(lab):
    hand = lab.hand()
    x, value = hand.placeholder("x", 3, 4), hand.attribute("slots.p0__a.B", 4)
    graph = hand.done(hand.call(aten.cumsum.default, hand.call(aten.add.Tensor, x, value), 0))
    RouteRows().run(graph)  # what comes after an adapter is whatever it was
    hand = lab.hand()
    x, value = hand.placeholder("x", 3, 4), hand.attribute("slots.p0__a.B", 3, 4)
    graph = hand.done(hand.call(aten.add.Tensor, x, value))
    with pytest.raises(UnroutedError, match="first axis is not the rows"):
        RouteRows().run(graph)


@pytest.mark.parametrize(
    ("operator", "args", "draws"),
    [
        (aten.dropout.default, (0.5, True), True),
        (aten.dropout.default, (0.0, True), False),
        (aten.dropout.default, (0.5, False), False),
        (aten.rand_like.default, (), True),
        (aten.relu.default, (), False),
    ],
)
def test_what_draws_numbers(operator, args, draws, lab):
    hand = lab.hand()
    hand.done(hand.call(operator, hand.placeholder("x", 3, 4), *args))
    assert draws_numbers(hand.graph) is draws


@pytest.mark.parametrize(("given", "draws"), [({}, False), ({"dropout_p": 0.0}, False), ({"dropout_p": 0.1}, True)])
def test_attention_that_draws(given, draws, lab):
    hand = lab.hand()
    x = hand.placeholder("x", 1, 2, 3, 4)
    hand.done(hand.call(aten.scaled_dot_product_attention.default, x, x, x, **given))
    assert draws_numbers(hand.graph) is draws
    hand = lab.hand()
    x = hand.placeholder("x", 1, 2, 3, 4)
    hand.done(hand.call(aten.scaled_dot_product_attention.default, x, x, x, None, given.get("dropout_p", 0.0)))
    assert draws_numbers(hand.graph) is draws


TASKED = """
method tuned(tasks: int = 3) {
    on    linear
    param S[tasks, out] = zeros saved "tuned"
    W'    = W * (1 + reshape(noisy(gather(S, task(tasks))), [out, 1]))
}
adapter a = tuned { on first }
"""


@pytest.mark.parametrize("training", [False, True])
def test_a_task_is_part_of_a_choice(training, lab):
    """It is read where the adapter's tensors are computed with, and what is drawn there no graph of a call has left."""
    mixed = Mixed(lab, "Two", TASKED, LOW, training=training)
    (lane,) = (each for each in mixed.route.lanes if "asked__task" in str(each.prologue))
    assert lane.draws is training
    assert not any(each.draws for each in mixed.route.lanes if each is not lane)
    assert "asked__task" not in str(mixed.graph)
    assert not draws_numbers(mixed.graph)
