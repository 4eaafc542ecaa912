import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.virtual_tokens import widen
from peftc.passes.virtual_tokens.front_value import by_slot, length_of, prompts

PROMPT = "adapter a = prompt(length = 3)"
TASKS = "adapter b = multitask_prompt(length = 2, tasks = 4, ranks = 2)"
NETWORK = "adapter c = ptuning(length = 2, hidden = 5, submodules = 2)"
OVER = """method over(length: int = 4) {
    on prompt
    param G[length, in] = zeros saved "G"
    prompt' = 0.5 * (G @ W.T)
} adapter d = over"""


@pytest.fixture
def fronted(lab):
    """`fronted(specs)`: the prompts of these adapters as a graph returns them, and the adapters."""

    def run(*specs, dtype=torch.float32, tasks=None):
        active, hand = lab.active("Reader", *specs), lab.hand()
        near, chosen = hand.placeholder("near", 2, 5), hand.placeholder("tasks", 2, dtype=torch.int64)
        weight = hand.attribute("embed.weight", 9, 8)
        graph = hand.done(near)
        emit = Emit(graph, graph.find_nodes(op="output")[0], Origin("test"), like=near)
        fronts = active.structure.at("prompt")
        node = prompts(
            emit, fronts, active.slot_value, near, dtype=dtype, weight=weight, tasks=None if tasks is None else chosen
        )
        widen.set_outputs(graph, [node])
        given = {"near": torch.zeros(2, 5), "tasks": torch.zeros(2).long() if tasks is None else tasks}
        (value,) = lab.results(graph, lab.tensors("Reader") | active.tensors, **given)
        assert (node.meta["val"].shape, node.meta["val"].dtype) == (value.shape, value.dtype)
        return value, active, graph

    return run


def test_golden(fronted, lab, golden):
    golden("passes/virtual_tokens/front_value.txt", lab.show(fronted(PROMPT, TASKS, tasks=torch.tensor([0, 1]))[2]))


def test_one_prompt_is_of_one_row(fronted):
    value, active, _ = fronted(PROMPT)
    assert_close(value, active.tensor(0, "@prompt", "P")[None])


def test_prompts_one_after_the_other(fronted):
    value, active, _ = fronted(PROMPT, PROMPT.replace("adapter a", "adapter e"))
    assert length_of(active.structure.at("prompt")) == 6
    assert_close(value, torch.cat([active.tensor(position, "@prompt", "P") for position in (0, 1)])[None])


def test_a_network(fronted):
    value, active, _ = fronted(NETWORK)
    e, a, bias_a, b, bias_b, c, bias_c = (active.tensor(0, "@prompt", role) for role in "EAaBdCc")
    hidden = torch.relu(torch.relu(e @ a.T + bias_a) @ b.T + bias_b) @ c.T + bias_c
    assert hidden.shape == (4, 8), "the second two are for a second stack"
    assert_close(value, hidden[None, :2])


def test_prompts_over_the_embeddings(fronted, lab):
    """`W` is what the module returns for each token: `[out, in]`."""
    value, active, _ = fronted(OVER)
    wanted = 0.5 * active.tensor(0, "@prompt", "G") @ lab.model("Reader").embed.weight
    assert_close(value, wanted[None])


def test_a_row_gets_the_prompt_of_its_task(fronted):
    tasks = torch.tensor([3, 1])
    value, active, _ = fronted(TASKS, PROMPT, tasks=tasks)
    shared, columns, rows = (active.tensor(0, "@prompt", role) for role in "PCR")
    for row, task in zip(value, tasks, strict=True):
        own = shared * (columns[task] @ rows[task])
        assert_close(row, torch.cat([own, active.tensor(1, "@prompt", "P")]))
    assert not torch.allclose(value[0], value[1])


def test_another_type(fronted):
    value, active, _ = fronted(PROMPT, dtype=torch.bfloat16)
    assert torch.equal(value[0], active.tensor(0, "@prompt", "P").bfloat16())


def test_by_slot(lab):
    """Keys of layer i at 2i, values at 2i + 1, each `[heads, length, size]`."""
    active, hand = lab.active("Seer", "adapter a = prefix(length = 3)"), lab.hand()
    site = active.structure.fronts[0].site
    node = hand.placeholder("x", 1, 3, site.out_features)
    graph = hand.done(node)
    emit = Emit(graph, graph.find_nodes(op="output")[0], Origin("test"), like=node)
    widen.set_outputs(graph, [by_slot(emit, node, site, 3)])
    prefix = torch.randn(1, 3, site.out_features)
    got = lab.run(graph, {}, prefix)
    assert got.shape == (2 * site.layers, site.heads, 3, 4)
    for slot, own in enumerate(prefix[0].split(site.in_features, 1)):
        assert_close(got[slot], own.unflatten(1, (site.heads, 4)).transpose(0, 1))
