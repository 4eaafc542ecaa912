"""After every pass, of every graph that the passes' tests have, each value is what its operator gives."""

from dataclasses import dataclass, field

import pytest
import torch

from peftc.compiler.pipeline import managed
from peftc.compiler.pipeline.lower import lower, specialise
from peftc.passes.cost.cost import Choice
from peftc.passes.export.bank_pieces import pieces_of
from peftc.passes.export.fold import Fold
from peftc.passes.export.lift import Lift
from peftc.passes.export.route import Route
from peftc.passes.export.start_empty import StartEmpty
from peftc.passes.ir import pass_manager
from peftc.passes.ir.values import wrong_value
from peftc.passes.plan.by_row import by_row
from peftc.runtime.execution import virtual
from tests.passes.conftest import Lab, lab, lab_of_all  # noqa: F401 - fixtures
from tests.passes.export.lifted import BATCH, SEQUENCE, X, lifted

aten = torch.ops.aten
LORA = "adapter a = lora(rank = 2, alpha = 6) { on all linear }"
TOKENS = "adapter a = trainable_tokens { tokens [5, 2] in embed, head }"


@dataclass(frozen=True)
class Case:
    """A model of the bench, adapters on it, and how it is called."""

    model: str
    specs: tuple[str, ...]
    mode: str = ""
    training: bool = False
    dense: tuple[str, ...] = ()
    weights: tuple[float, ...] = field(default=())

    def __str__(self) -> str:
        return (
            f"{self.model} {' '.join(self.specs)[12:50]} {self.mode}{' training' * self.training}{'+'.join(self.dense)}"
        )


CASES = (
    *(Case("Two", (LORA, "adapter b = dora(rank = 2) { on first }"), training=each) for each in (False, True)),
    *(Case("Two", ("adapter a = loha(rank = 2) { on first }",), dense=each) for each in ((), ("first",))),
    Case("Two", ("adapter a = lora(rank = 2) { on second  train first }",)),
    Case("Lookup", ("adapter a = lora(rank = 2) { on embed, conv, bag.table }",)),
    Case("Lookup", ("adapter a = trainable_tokens { tokens [5, 2] in embed }",)),
    Case("Experts", ("adapter a = lora(rank = 2) { on stack }",)),
    Case("Tied", (TOKENS,)),
    Case("Attention", (LORA,)),
    Case("Scan", ("adapter a = lora(rank = 2) { on strided, grouped, line, solid }",), training=True),
    Case("Packed", ("adapter a = lora(rank = 2) { on own.in_proj_weight, other.out_proj }",)),
    Case("Seer", ("adapter a = prefix(length = 3)",), virtual.HEADS),
    Case("Seer", ("adapter a = prefix(length = 3)",), virtual.HEADS, weights=(0.5,)),
    Case("Seer", ("adapter a = adaption_prompt(length = 3)", "adapter b = lora(rank = 2) { on q_proj, o_proj }")),
    *(Case(name, ("adapter a = prefix(length = 3)",), virtual.PREFIX) for name in ("Reader", "Judge")),
    Case("Reader", ("adapter a = prefix(length = 3)",), virtual.PREFIX, weights=(0.5,)),
    *(
        Case(name, ("adapter a = prompt(length = 3)",), mode)
        for name in ("Reader", "Judge")
        for mode in (virtual.START, virtual.CARRY)
    ),
    Case(
        "Reader",
        ("adapter a = prompt(length = 3)", "adapter b = multitask_prompt(length = 2, tasks = 4, ranks = 2)"),
        virtual.START,
    ),
)
RUN: set[str] = set()


@pytest.fixture(autouse=True)
def full(monkeypatch):
    """Every value after every pass, and which passes there were."""
    monkeypatch.setenv(managed.VERIFY, "full")
    whole = pass_manager.check

    def check(graph, after, *, full=False):
        assert full
        RUN.add(after.name)
        whole(graph, after, full=full)

    monkeypatch.setattr(pass_manager, "check", check)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_specialised_and_lowered(case, lab: Lab):  # noqa: F811
    active, traced = lab.active(case.model, *case.specs, weights=case.weights), lab.traced(case.model, case.training)
    choice = Choice(dense=frozenset(case.dense), frozen=not case.training)
    graph = specialise(
        traced,
        active.structure,
        active.slot_value,
        training=case.training,
        autocast=False,
        choice=choice,
        mode=case.mode,
    )
    assert any("peftc" in node.meta for node in graph.nodes)
    lowered = lower(graph, autocast=False, choice=choice)
    for made in (graph, lowered.traceable, lowered.plain):
        assert [each for node in made.nodes if (each := wrong_value(node, full=True))] == []


def test_by_row(lab: Lab):  # noqa: F811
    one, two = (lab.active("Two", f"adapter a = {each} {{ on first, second }}") for each in ("lora(rank = 2)", "ia3"))
    shared = by_row([one.structure, two.structure])

    def slot_value(position, site, role, near):
        return (one, two)[position].slot_value(0, site, role, near)

    traced = lab.traced("Two")
    graph = specialise(traced, shared.structure, slot_value, training=False, autocast=False)
    lowered = lower(graph, autocast=False, by_row=True)
    assert [sorted(lane.slots) for lane in lowered.lanes]
    for made in (lowered.traceable, lowered.plain, *(lane.prologue for lane in lowered.lanes)):
        assert [each for node in made.nodes if (each := wrong_value(node, full=True))] == []


def test_started_empty(lab: Lab):  # noqa: F811
    managed.run(lab.graph("Reader"), [StartEmpty(("past_0_key", "past_0_value"), "input_ids")])


def adapted(call, inputs, held):
    """x (w + B A)^T"""
    change = call(aten.mm.default, (held["B"], held["A"]))
    return call(aten.linear.default, (inputs[0], call(aten.add.Tensor, (held["w"], change))))


@pytest.mark.parametrize("placed", ["folded", "routed"])
def test_exported(placed):
    tensors = {"w": torch.randn(4, 4), "A": torch.randn(2, 4), "B": torch.randn(4, 2)}
    graph = lifted(adapted, tensors, X).graph
    taken = iter(list(tensors.items()))
    inside = {node.target: next(taken) for node in list(graph.find_nodes(op="placeholder"))[: len(tensors)]}
    source = _unlifted(graph, inside)
    lift = Lift((X,), (BATCH, SEQUENCE), lambda name: (name, tensors[name]))
    slots = {"A": "A", "B": "B"}
    made = lift.run(source).subject
    sizes = {each.name: each.node.meta["val"].shape for each in pieces_of(made, slots)}
    last = Fold(frozenset("AB")) if placed == "folded" else Route(slots, frozenset(), "adapter_ids", sizes)
    result = managed.run(source, [lift, last])
    assert list(result.changes) == ["lift", last.name]
    assert result.changes[last.name].made


def _unlifted(graph, inside):
    """The graph with its tensors read again, as a specialised graph reads them."""
    for node in list(graph.find_nodes(op="placeholder")):
        if node.target in inside:
            with graph.inserting_before(node):
                read = graph.create_node("get_attr", inside[node.target][0])
            read.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(read)
            graph.erase_node(node)
    return graph


def test_every_pass_was_there():
    """Of all that the pipelines have; this file's tests run in order."""
    assert {
        *(
            "clean",
            "insert-prefix",
            "carry-prompt",
            "insert-prompt",
            "insert-heads",
            "insert-attention",
            "insert-delta",
        ),
        *("insert-tokens", "insert-copy", "stop-early", "lower-quantized", "join-cats", "group-heads", "float-mask"),
        *(
            "route-rows",
            "fuse-rows",
            "group-rows",
            "fuse-low-rank",
            "add-in-place",
            "hoist",
            "native-calls",
            "start-empty",
            "lift",
            "fold",
            "route",
        ),
    } <= RUN
