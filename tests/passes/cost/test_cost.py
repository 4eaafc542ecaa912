from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from peftc import compiler
from peftc.compiler.example_calls import call_like
from peftc.passes.cost import cost
from peftc.passes.cost.cost import alternatives, anonymous, cheapest, estimate, sizes_of, typical
from peftc.passes.cost.op_cost import Work

METHODS = ("lora(rank = 2)", "dora(rank = 2)", "loha(rank = 2)", "hira(rank = 2)", "oft(block = 4)", "lokr()", "ia3()")


def adapted(spec, *sizes, dtype=torch.float32):
    """The adapted site of a linear of these sizes, and the sizes of the adapter's tensors."""
    out_features, in_features = sizes
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=False, dtype=dtype))
    made = compiler.apply(model, f'adapter a = {spec} {{ on "0" }}')
    tenant = made._adapter_state.engine._tenant
    (at,) = tenant.specialisation.structure.sites
    return at, sizes_of(at, tenant.lookup)


def of(found, tokens, lowering, training=False, frozen=False):
    return estimate(*found, tokens, lowering, training=training, frozen=frozen)


# --- numbers a person can count ---


def test_a_low_rank_term_pushed():
    """linear(x, W), linear(x, A), and one addmm into the first's output."""
    found = of(adapted("lora(rank = 2)", 8, 16), 5, "pushed")
    assert found.flops == 2 * 5 * (8 * 16 + 2 * 16 + 2 * 8)
    base = 5 * 16 + 8 * 16 + 5 * 8
    down = 5 * 16 + 2 * 16 + 5 * 2
    up = 5 * 8 + 5 * 2 + 2 * 8 + 5 * 8
    assert found.bytes == 4 * (base + down + up)
    assert found.calls == 4  # and a view of B


def test_a_low_rank_term_computed():
    found = of(adapted("lora(rank = 2)", 8, 16), 5, "dense")
    assert found.flops == 2 * 8 * 16 * 2 + 2 * 8 * 16 + 2 * 5 * 8 * 16  # B @ A, times s, plus W, linear
    assert found.calls == 4


def test_gradients():
    """Of x through both linears and their sum, of A and B. The base weight has none."""
    site = adapted("lora(rank = 2)", 8, 16)
    forward, both = of(site, 5, "pushed"), of(site, 5, "pushed", training=True)
    into_base, low = 2 * 5 * 8 * 16, 2 * 5 * 2 * (16 + 8)
    assert both.flops - forward.flops >= into_base + 2 * low
    assert both.flops - forward.flops < into_base + 2 * low + 2 * low  # nothing is counted for W
    dense = of(site, 5, "dense", training=True).flops - of(site, 5, "dense").flops
    assert dense > 2 * into_base  # of x and of W'


def test_what_is_kept_costs_nothing_in_a_call():
    site = adapted("loha(rank = 2)", 8, 16)
    kept = of(site, 5, "kept", frozen=True)
    assert kept.flops == 2 * 5 * 8 * 16
    assert of(site, 5, "pushed", frozen=True).flops < of(site, 5, "pushed").flops
    assert of(site, 5, "dense", frozen=True) == of(site, 5, "dense")  # computed in every call all the same


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_work_grows_evenly_with_the_tokens(method, training):
    site = adapted(method, 12, 8)
    for lowering in ("pushed", "dense"):
        few, more, most = (of(site, tokens, lowering, training=training) for tokens in (1, 10, 100))
        assert (most.flops - more.flops) == 10 * (more.flops - few.flops)
        assert (most.bytes - more.bytes) == 10 * (more.bytes - few.bytes)
        assert few.calls == most.calls
        assert 0 < few.seconds < more.seconds < most.seconds


def test_work_is_what_torch_counts():
    """The products, against torch's own counter on the graph that really runs."""
    model = compiler.apply(nn.Sequential(nn.Linear(64, 64, bias=False)).eval(), 'adapter a = lora { on "0" }').eval()
    with torch.no_grad():
        model(torch.zeros(3, 64))  # traces
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(3, 64))
    uncounted = 2 * 3 * 8 * 64  # an addmm in place
    assert counter.get_total_flops() + uncounted == of(adapted("lora", 64, 64), 3, "pushed").flops


def test_works_add_up():
    assert Work(1, 2, 3) + Work(10, 20, 30) * 2 == Work(21, 42, 63)


# --- choices ---


def test_few_tokens_are_pushed_and_many_are_not():
    site = adapted("loha(rank = 8)", 512, 512)
    chosen = [cheapest(*site, tokens, training=False, frozen=False) for tokens in (1, 4096)]
    assert chosen == ["pushed", "dense"]
    trained = [cheapest(*adapted("lora", 512, 512), tokens, training=True, frozen=False) for tokens in (1, 10**5)]
    assert trained == ["pushed", "pushed"]  # the gradient of W' costs more than thin products


def test_a_matrix_that_is_needed_anyway_is_kept_when_nothing_trains():
    names = {}
    for method in METHODS:
        site = adapted(method, 64, 64)
        names[method] = tuple(alternatives(*site, 8, training=False, frozen=True))
        assert tuple(alternatives(*site, 8, training=False, frozen=False)) == ("pushed", "dense")
    assert names["loha(rank = 2)"] == names["hira(rank = 2)"] == ("pushed", "kept")
    assert names["lora(rank = 2)"] == names["dora(rank = 2)"] == ("pushed", "dense")


def test_an_adapter_of_more_digits_is_pushed():
    """What is added to an activation is not rounded to the weight's type."""
    site = adapted("loha(rank = 2)", 64, 64, dtype=torch.bfloat16)
    assert tuple(alternatives(*site, 10**6, training=False, frozen=True)) == ("pushed",)


def test_sites_that_no_law_covers_are_computed(lab):
    active = lab.active("Experts", "adapter a = lora(rank = 2) { on stack }")
    (at,) = active.structure.sites
    sizes = sizes_of(at, active.tensor)
    for frozen in (False, True):  # a stack that was kept would double what is most of its model
        assert tuple(alternatives(at, sizes, 7, training=False, frozen=frozen)) == ("dense",)
    lone = replace(at, site=replace(at.site, count=1))
    assert tuple(alternatives(lone, sizes, 7, training=False, frozen=True)) == ("kept",)
    computed = estimate(at, sizes, 7, "dense", training=False, frozen=False)
    assert computed == estimate(at, sizes, 700, "dense", training=False, frozen=False)
    assert computed.flops == 3 * (2 * 4 * 5 * 2 + 2 * 4 * 5)


def test_every_kind_of_site_has_a_cost(lab):
    active = lab.active("Lookup", "adapter a = lora(rank = 2) { on embed, conv, bag.table }")
    for at in active.structure.sites:
        costs = alternatives(at, sizes_of(at, active.tensor), 7, training=True, frozen=False)
        assert all(each.flops and each.bytes and each.seconds for each in costs.values()), at.site.name


def test_choices_are_by_site():
    """At a small site a call costs more than a matrix."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 512), nn.Linear(512, 512))
    made = compiler.apply(model, "adapter a = loha(rank = 2) { on all linear }")
    tenant = made._adapter_state.engine._tenant
    few, many, frozen = (
        tenant.specialisation.choice(tenant.lookup, tokens, training=False, frozen=frozen)
        for tokens, frozen in ((1, False), (10**6, False), (1, True))
    )
    assert "0" in few.dense
    assert "2" not in few.dense
    assert many == cost.Choice(dense=frozenset("012"))
    assert frozen == cost.Choice(kept=frozenset("012"), frozen=True)


def test_sites_alike_are_counted_once(monkeypatch):
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6)), nn.Linear(24, 40))
    made = compiler.apply(model, "adapter a = lora(rank = 3) { on all linear }")
    tenant = made._adapter_state.engine._tenant
    lowered = []
    original = cost._lowered
    monkeypatch.setattr(cost, "_lowered", lambda *given: lowered.append(given) or original(*given))
    for tokens in (1, 3, 70, 5000):
        for training in (False, True):
            tenant.specialisation.choice(tenant.lookup, tokens, training=training, frozen=False)
    assert len(lowered) == 2 * 2  # two kinds of site, two lowerings
    assert len({anonymous(each) for each in tenant.specialisation.structure.sites}) == 2


@pytest.mark.parametrize(("tokens", "taken"), [(1, 1), (2, 3), (3, 3), (4, 6), (7, 6), (1024, 1536), (2047, 1536)])
def test_sizes_share_choices(tokens, taken):
    assert typical(tokens) == taken


def test_more_threads_are_faster_at_work_and_not_at_calls(monkeypatch):
    site = adapted("lora(rank = 2)", 512, 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    few, many = of(site, 1, "pushed"), of(site, 4096, "pushed")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert of(site, 4096, "pushed").seconds < many.seconds / 3.9
    assert of(site, 1, "pushed").seconds > few.seconds / 4
    assert of(site, 1, "pushed").flops == few.flops


# --- the choice is one of speed alone ---


@pytest.mark.parametrize("method", ["dora(rank = 2)", "loha(rank = 2)", "oft(block = 4)", "ia3()"])
@pytest.mark.parametrize("mode", ["frozen", "eval", "train"])
def test_outputs_and_gradients_are_equal_whatever_is_chosen(method, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).eval()
    made = compiler.apply(model, f"adapter a = {method} {{ on all linear }}", regions="model").train(mode == "train")
    for each in made.parameters():
        if each.requires_grad:
            nn.init.normal_(each, std=0.3)
    made.set_adapter("a", inference_mode=mode == "frozen")
    trained = [each for each in made.parameters() if each.requires_grad]
    x = torch.randn(5, 8, requires_grad=True)
    engine = made._adapter_state.engine
    call = call_like(made, (x,))
    results = []
    with torch.set_grad_enabled(mode == "train"):
        engine._choice(call)
        (key,) = engine._tenant.choices
        for dense, kept in (((), ()), (("0", "2"), ()), ((), ("0", "2")), (("0",), ("2",))):
            engine._tenant.choices[key] = cost.Choice(frozenset(dense), frozenset(kept), mode == "frozen")
            out = made(x)
            results.append((out, *(torch.autograd.grad(out.sum(), [x, *trained]) if mode == "train" else ())))
    first, *others = results
    assert len(engine._tenant.specialisation.programs) >= 3
    assert not torch.allclose(first[0], model(x), atol=1e-3)
    for other in others:
        assert_close(other, first, rtol=1e-4, atol=1e-5)
