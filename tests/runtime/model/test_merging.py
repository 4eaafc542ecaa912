"""Merged copies, merging that is interrupted, and what others do to merged weights: nothing is lost."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.merge.merge import merged_tensors
from peftc.runtime.model import merging
from peftc.runtime.model.merging import merged_copy

SPECS = {
    "one by one": "adapter a = lora(rank = 2) { on all linear }",
    "with a copy": 'adapter a = lora(rank = 2) {\n on "0"\n train "1"\n}',
    "a bias comes": 'adapter a = lora(rank = 2, bias = true) { on "0" }',
}
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def adapted_by(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 3)).eval()
    adapted = compiler.apply(model, spec).eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapted


def everything(model):
    state = model._adapter_state
    named = [*model.state_dict(keep_vars=True).items(), *model.named_modules()]
    return {name: id(each) for name, each in named}, state.active, dict(state.displaced), state.base.merged


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@torch.no_grad()
def test_a_merged_copy_is_what_merging_gives(spec, tmp_path):
    adapted = adapted_by(spec)
    before, unmerged = everything(adapted), adapted(X)
    copied = merged_copy(adapted, tmp_path, safe=False, quantized=None)
    given = copied(X)
    assert everything(adapted) == before
    assert torch.equal(adapted(X), unmerged)
    with adapted.disable_adapter():
        assert not torch.allclose(given, adapted(X))
    adapted.merge_adapter()
    assert torch.equal(given, adapted(X))
    assert merged_copy(adapted, tmp_path, safe=False, quantized=None) is adapted
    adapted.unmerge_adapter()
    assert torch.equal(adapted(X), unmerged)


def test_a_merged_copy_has_the_traces_of_the_model_unless_a_bias_came(tmp_path):
    for spec in SPECS.values():
        adapted = adapted_by(spec)
        adapted(X)
        copied = merged_copy(adapted, tmp_path, safe=False, quantized=None)
        alike = (copied[0].bias is None) is (adapted[0].bias is None)
        adapted._adapter_state.engine.run("", {"input": X})
        traces = adapted._adapter_state.engine._traces
        assert traces
        assert (copied._adapter_state.engine._traces is traces) is alike


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_computing_that_fails_merges_nothing(error, monkeypatch):
    adapted = adapted_by(SPECS["with a copy"])
    before, unmerged = everything(adapted), adapted(X)

    def fails(*_, **__):
        raise error("ours")

    with monkeypatch.context() as patched:
        patched.setattr(merging, "merged_tensors", fails)
        with pytest.raises(error, match="ours"):
            adapted.merge_adapter()
    assert everything(adapted) == before
    assert torch.equal(adapted(X), unmerged)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("action", ["merge", "unmerge"])
def test_a_swap_that_is_interrupted_is_undone(action, error, monkeypatch):
    adapted = adapted_by(SPECS["with a copy"])
    if action == "unmerge":
        adapted.merge_adapter()
    before, output = everything(adapted), adapted(X)
    known, calls = AdapterSet.activate, []

    def fails_at_first(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise error("ours")
        return known(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(AdapterSet, "activate", fails_at_first)
        with pytest.raises(error, match="ours"):
            adapted.merge_adapter() if action == "merge" else adapted.unmerge_adapter()
    assert everything(adapted) == before
    assert torch.equal(adapted(X), output)


def test_disabling_a_merged_model_nests_and_comes_back_after_an_error():
    adapted = adapted_by(SPECS["one by one"])
    adapted.disable_adapters()
    base = adapted(X)
    adapted.enable_adapters()
    adapted.merge_adapter()
    before, merged = everything(adapted), adapted(X)

    def fails():
        with adapted.disable_adapter(), adapted.disable_adapter():
            assert torch.equal(adapted(X), base)
            raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        fails()
    assert everything(adapted) == before
    assert torch.equal(adapted(X), merged)


@torch.no_grad()
def test_what_is_merged_while_adapters_are_disabled_rests():
    adapted = adapted_by(SPECS["one by one"])
    active = adapted(X)
    adapted.disable_adapters()
    base = adapted(X)
    adapted.merge_adapter()
    assert torch.equal(adapted(X), base)
    adapted.enable_adapters()
    torch.testing.assert_close(adapted(X), active)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(X), active)


@pytest.mark.parametrize("there", [True, False], ids=["came", "went"])
@pytest.mark.parametrize("method", ["lora(rank = 2)", "lora(rank = 2, bias = true)", "ia3", "beft"])
@torch.no_grad()
def test_a_bias_that_came_or_went_since_the_adapter_was_planned(there, method, tmp_path):
    torch.manual_seed(0)
    bias = nn.Parameter(torch.arange(5.0))
    model = nn.Sequential(nn.Linear(4, 5, bias=not there), nn.Tanh(), nn.Linear(5, 3)).eval()
    spec = f'adapter a = {method} {{ on "0" }}'
    adapted = compiler.apply(model, spec).eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter, std=0.5)
    before = adapted(X)
    values = [each.clone() for each in adapted.adapter_bank.parameters()]
    model[0].bias = adapted[0].bias = bias if there else None
    fresh = compiler.apply(model, spec).eval()
    for parameter, value in zip(fresh.adapter_bank.parameters(), values, strict=True):
        parameter.copy_(value)
    wanted = fresh(X)
    assert not torch.allclose(wanted, before, atol=1e-3)
    torch.testing.assert_close(adapted(X), wanted)
    torch.testing.assert_close(merged_copy(adapted, tmp_path, safe=False, quantized=None)(X), wanted)
    torch.testing.assert_close(adapted.merge_and_unload()(X), wanted)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(X), wanted)


def test_measured_outputs_are_those_of_a_real_merge():
    adapted = adapted_by(SPECS["one by one"]).to(torch.bfloat16)
    given = torch.linspace(-2, 2, 400).reshape(100, 4).to(torch.bfloat16)
    before = everything(adapted)
    drift = adapted.merge_drift(given)
    assert everything(adapted) == before
    with torch.no_grad(), adapted._adapter_state.engine.unmerged():
        unmerged = adapted(given).double()
        adapted.merge_adapter()
        merged = adapted(given).double()
    assert drift.outputs.largest == float((unmerged - merged).abs().max()) > 0


def test_nothing_is_merged_twice(tmp_path):
    adapted = adapted_by(SPECS["one by one"])
    adapted.merge_adapter()
    with pytest.raises(UsageError, match="E516"):
        merging.mergeable(adapted._adapter_state, None)
    adapted.unmerge_adapter()
    adapters = [(adapted._adapter_state.adapter("a"), 1.0)]
    assert merged_tensors(adapted, adapters).keys() == {"0.weight", "2.weight"}


def replaced(adapted):
    adapted[0] = nn.Linear(4, 5, bias=False)
    return adapted[0]


@pytest.mark.parametrize("rests", [False, True], ids=["merged", "disabled for a while"])
@torch.no_grad()
def test_what_is_merged_goes_with_its_module(rests):
    adapted = adapted_by(SPECS["one by one"])
    base, first = adapted[0].weight, adapted[0]
    adapted.merge_adapter()
    merged = adapted[0].weight
    new = replaced(adapted)
    own = new.weight
    wanted = adapted[2](adapted[1](X @ own.T))
    torch.testing.assert_close(adapted(X), wanted, msg="what stands there now was not merged")
    if rests:
        with adapted.disable_adapter():
            assert (first.weight, new.weight) == (base, own)
        assert (first.weight, new.weight) == (merged, own)
    torch.testing.assert_close(adapted.merge_and_unload()(X), wanted)
    assert torch.equal(adapted.unload()[0].weight, own)
    adapted.unmerge_adapter()
    assert (first.weight, new.weight) == (base, own)
    adapted[0] = first
    assert torch.equal(adapted(X), adapted_by(SPECS["one by one"])(X))


@torch.no_grad()
def test_what_is_merged_goes_with_modules_that_change_places():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    adapted = compiler.apply(model, 'adapter a = lora(rank = 2) { on "0", "1" }').eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter, std=0.5)
    weights = [each.weight for each in adapted[:2]]
    adapted.merge_adapter()
    merged = [each.weight for each in adapted[:2]]
    adapted[0], adapted[1] = adapted[1], adapted[0]
    wanted = model[2](adapted[1](adapted[0](X)))
    assert [each.weight for each in adapted[:2]] == merged[::-1]
    torch.testing.assert_close(adapted.merge_and_unload()(X), wanted)
    torch.testing.assert_close(adapted.unload()(X), model[2](model[0](model[1](X))))
    for copied in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        copied.unmerge_adapter()
        assert all(map(torch.equal, [each.weight for each in copied[:2]], weights[::-1]))
    adapted.unmerge_adapter()
    assert [each.weight for each in adapted[:2]] == weights[::-1]


def written(adapted):
    adapted[0].weight.mul_(2)


def loaded(adapted):
    adapted.load_state_dict({"0.weight": torch.ones(5, 4)}, strict=False)


def assigned(adapted):
    adapted.load_state_dict({"0.weight": torch.ones(5, 4)}, strict=False, assign=True)


def set_anew(adapted):
    adapted[0].weight = nn.Parameter(torch.ones(5, 4))


CHANGES = [written, loaded, assigned, set_anew]
KEPT = {
    "itself": lambda adapted: adapted,
    "copy": copy.deepcopy,
    "pickle": lambda adapted: pickle.loads(pickle.dumps(adapted)),
    "other type": lambda adapted: adapted.to(torch.float64),
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_unmerging_does_not_lose_what_was_put_into_merged_weights(change, keep):
    adapted = adapted_by(SPECS["one by one"])
    base = adapted[0].weight.clone()
    adapted.merge_adapter()
    change(adapted)
    adapted = keep(adapted)
    new = adapted[0].weight.clone()
    with pytest.raises(UsageError, match=r"E586.*0\.weight"):
        adapted.unmerge_adapter()
    with pytest.raises(UsageError, match=r"E586"), pytest.warns(match="unmerged before others are activated"):
        adapted.set_adapter("a")
    assert torch.equal(adapted[0].weight, new)
    with adapted.disable_adapter():
        assert torch.equal(adapted[0].weight, base.to(new))
    assert torch.equal(adapted[0].weight, new)
    assert torch.equal(adapted.merge_and_unload()[0].weight, new)
    assert torch.equal(adapted.unload()[0].weight, base.to(new))


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@torch.no_grad()
def test_what_leaves_merged_weights_as_they_are_does_not_hinder_unmerging(keep):
    adapted = adapted_by(SPECS["with a copy"])
    unmerged = adapted(X)
    adapted.merge_adapter()
    adapted.load_state_dict(adapted.state_dict())
    adapted.requires_grad_(True).requires_grad_(False)
    adapted.load_state_dict({name: each.clone() for name, each in adapted.state_dict().items()}, assign=True)
    adapted = keep(adapted)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted(X.to(adapted[0].weight)).to(X), unmerged)


# --- which are merged, and with what weights ---

PAIR = """
adapter a = lora(rank = 2) { on "0" }
adapter b = lora(rank = 1, alpha = 3, rslora = true) { on "0", "2" }
adapter turned = oft(block = 2) { on "0" }
adapter whole = lora(rank = 1) { on "0" train "1" }
adapter other = lora(rank = 1) { on "2" train "1" }
adapter masks = loha(rank = 1) { on "2" }
"""


def bits(model):
    return {name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()}


def is_as_before(model, before):
    now = model.state_dict(keep_vars=True)
    return now.keys() == before.keys() and all(
        id(now[name]) == own and torch.equal(now[name], value) for name, (own, value) in before.items()
    )


def by_formula(adapted, weights):
    """W + the sum of w * (W' - W), of what each adapter alone makes of the weights."""
    base = adapted.unload().state_dict()
    found = {name: each.clone() for name, each in base.items()}
    for name, weight in weights.items():
        for key, each in adapted.merge_and_unload(adapter_names=[name]).state_dict().items():
            found[key] += weight * (each - base[key])
    return found


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": -0.4}, {"b": 0.5}, {"b": 2, "a": 0}, {"masks": 0.3, "a": 1.5}])
@torch.no_grad()
def test_weights_are_those_of_the_formula_everywhere(weights):
    adapted = adapted_by(PAIR + "activate a")
    before, wanted, outputs = bits(adapted), by_formula(adapted, weights), adapted(X)
    plain = adapted.merge_and_unload(adapter_names=weights)
    torch.testing.assert_close(plain.state_dict(), wanted)
    assert is_as_before(adapted, before)
    adapted.merge_adapter(adapter_names=weights)
    assert adapted._adapter_state.base.merged == tuple(weights.items())
    assert torch.equal(adapted(X), plain(X))
    assert not torch.allclose(adapted(X), outputs)
    adapted.unmerge_adapter()
    assert is_as_before(adapted, before)
    assert torch.equal(adapted(X), outputs)
    adapted.set_adapter(weights)
    torch.testing.assert_close(adapted(X), plain(X), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_list_has_the_weights_that_are_active_or_one():
    adapted = adapted_by(PAIR + "activate 0.5 * a")
    wanted = by_formula(adapted, {"a": 1})  # by_formula names it in a list, where it has the weight that is active
    adapted.merge_adapter(["a", "b"])
    assert adapted._adapter_state.base.merged == (("a", 0.5), ("b", 1.0))
    adapted.unmerge_adapter()
    adapted.merge_adapter("a")
    assert adapted._adapter_state.base.merged == (("a", 0.5),)
    torch.testing.assert_close(adapted.get_submodule("0").weight.data, wanted["0.weight"])


@torch.no_grad()
def test_more_is_merged_with_weights_of_its_own():
    adapted = adapted_by(PAIR + "activate a")
    before, wanted = bits(adapted), by_formula(adapted, {"a": 1, "b": -0.5})
    adapted.merge_adapter()
    with pytest.warns(UserWarning, match="b will be merged beside what is merged: a"):
        adapted.merge_adapter({"a": 1, "b": -0.5})
    assert adapted._adapter_state.base.merged == (("a", 1.0), ("b", -0.5))
    torch.testing.assert_close(
        {name: adapted.state_dict()[name] for name in ("0.weight", "2.weight")},
        {name: wanted[name] for name in ("0.weight", "2.weight")},
    )
    adapted.unmerge_adapter()
    assert is_as_before(adapted, before)


WRONG = {
    "no such": (["a", "zz"], "E510", "no adapter 'zz'"),
    "no such, with a weight": ({"zz": 1}, "E510", "no adapter 'zz'"),
    "twice": (["a", "a"], "E512", "'a' is named twice"),
    "cannot be weighted": ({"turned": 0.5}, "E513", "'turned' cannot be weighted"),
    "a module as a whole": ({"whole": 0.5}, "E513", "trains 1 as a whole"),
    "no number": ({"a": "much"}, "E513", "given the weight 'much'"),
    "not finite": ({"a": float("nan")}, "E513", "given the weight nan"),
    "two of one tensor": (["whole", "other"], "E514", "both train their own 1"),
}


@pytest.mark.parametrize("there", ["nothing merged", "b merged"])
@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_merged_so_is_refused_and_changes_nothing(what, there):
    names, code, message = WRONG[what]
    adapted = adapted_by(PAIR + "activate b")
    if there == "b merged":
        adapted.merge_adapter()
    before = everything(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(UsageError, match=message) as caught:
            merge(adapter_names=names)
        assert {each.code for each in caught.value.diagnostics} == {code}
        assert everything(adapted) == before


def test_what_is_merged_has_one_weight():
    adapted = adapted_by(PAIR + "activate a")
    adapted.merge_adapter({"a": 0.5})
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(UsageError, match=r"E516.*merged already, with weight 0\.5 and not 0\.7"):
            merge(adapter_names={"a": 0.7})
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        adapted.merge_adapter({"a": 0.5})
