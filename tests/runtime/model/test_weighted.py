"""Adapters made of others: which there can be, where they go, and that a refusal changes nothing."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import AdapterError, SpecError, UsageError
from tests import zoo

IDS = torch.arange(3, 11).reshape(2, 4)
LORA = "lora(rank = 2) { on q_proj, v_proj }"


def adapted_by(*methods, model=None, active=True):
    """Adapters a, b, ... with values that do something."""
    model = zoo.make("llama", num_hidden_layers=2) if model is None else model
    spec = "\n".join(f"adapter {name} = {method}" for name, method in zip("abcd", methods, strict=False))
    adapted = compiler.apply(model, spec).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for each in adapted.adapter_bank.parameters():
            each.add_(torch.randn_like(each) * 0.2)
    if active:
        adapted.set_adapter("a")
    return adapted


def outputs(model):
    with torch.no_grad():
        return model(IDS).logits


def summed(adapted, weights):
    """What the weighted sum of active adapters gives; the adapters that were active are again."""
    adapted.set_adapter(weights)
    found = outputs(adapted)
    adapted.set_adapter("new")
    return found


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize(
    ("methods", "sites"),
    [
        ((LORA, "lora(rank = 3, alpha = 5) { on q_proj, v_proj }"), 4),
        ((LORA, "lora(rank = 3) { on all linear skip layers[0] }"), 9),
        (("lora(rank = 2) { on all linear skip v_proj refine q_proj with rank = 3 }", LORA), 14),
        (("lora { on embed_tokens }", "lora(rslora = true) { on lm_head }"), 2),
        (("lora", "lora { on layers[1].mlp.{up_proj, down_proj} }"), 6),
        (("lora(dropout = 0.1)", "lora"), 4),
        (("lora_orthogonal(rank = 2) { on q_proj }", "lora(rank = 1) { on q_proj }"), 2),
        (("lora(rank = 1) { on q_proj }", "lora_orthogonal(rank = 4) { on q_proj }"), 2),
        (('lora(init = "random")', "lora"), 4),
    ],
)
def test_what_is_combined_is_the_weighted_sum(kind, methods, sites, tmp_path):
    adapted = adapted_by(*methods)
    rank = 40 if kind == "svd" else None
    adapted.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", kind, svd_rank=rank)
    wanted = summed(adapted, {"a": 0.7, "b": -0.4})
    assert_close(outputs(adapted), wanted, rtol=0, atol=2e-5)
    assert len(adapted.adapter_plan("new").sites) == sites
    adapted.save_pretrained(tmp_path, selected_adapters=["new"])
    again = compiler.load(zoo.make("llama", num_hidden_layers=2), tmp_path / "new")
    assert_close(outputs(again), wanted, rtol=0, atol=2e-5)


def test_it_is_an_adapter_like_any_other():
    adapted = adapted_by(LORA, LORA)
    before = {name: each.clone() for name, each in adapted.named_parameters()}
    adapted.add_weighted_adapter(["a", "b"], [1, 2], "new", "cat")
    assert adapted.active_adapters() == ["a"]
    assert not any(each.requires_grad for each in adapted.adapter_bank.new.parameters())
    assert all(torch.equal(each, before[name]) for name, each in adapted.named_parameters() if name in before)
    values = dict(adapted.adapter_plan("new").sites[0].bound.values)
    assert (values["rank"], values["alpha"], values["rslora"]) == (4, 4.0, False)
    adapted.set_adapter("new")
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert all(each.grad is not None for each in adapted.adapter_bank.new.parameters())
    adapted.delete_adapter(["a", "b"])
    adapted.add_weighted_adapter(["new", "new"], [0.5, 0.5], "again")
    wanted = outputs(adapted.eval())
    adapted.set_adapter("again")
    assert_close(outputs(adapted), wanted, rtol=0, atol=2e-5)


def test_while_others_are_merged_or_disabled():
    adapted = adapted_by(LORA, LORA)
    adapted.merge_adapter()
    merged = outputs(adapted)
    adapted.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "cat")
    assert torch.equal(outputs(adapted), merged)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        adapted.add_weighted_adapter(["a", "b"], [0.5, 0.5], "more", "cat")
    adapted.set_adapter("new")
    wanted = outputs(adapted)
    adapted.set_adapter("more")
    assert torch.equal(outputs(adapted), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_a_half(dtype):
    adapted = adapted_by(LORA, LORA).to(dtype)
    adapted.add_weighted_adapter(["a", "b"], [0.7, 0.4], "new")
    assert {each.dtype for each in adapted.adapter_bank.new.parameters()} == {dtype}
    adapted.set_adapter("new")
    assert torch.isfinite(outputs(adapted)).all()


def test_projections_of_an_attention():
    attention = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    adapted = compiler.apply(
        attention, 'adapter a = lora(rank = 2) { on "0.*" } adapter b = lora(rank = 2) { on "0.*" }'
    )
    adapted.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "cat")
    kinds = [at.site.name for at in adapted.adapter_plan("new").sites]
    assert kinds == [at.site.name for at in adapted.adapter_plan("a").sites] == ["0.in_proj_weight", "0.out_proj"]


REFUSED = {
    "unknown": ((LORA,), ["a", "c"], [1, 1], {}, "E510", ValueError),
    "taken": ((LORA,), ["a"], [1], {"adapter_name": "a"}, "E511", UsageError),
    "none": ((LORA,), [], [], {}, "E580", ValueError),
    "a text": ((LORA,), "a", [1], {}, "E580", ValueError),
    "a weight too many": ((LORA,), ["a"], [1, 2], {}, "E580", ValueError),
    "a weight too few": ((LORA, LORA), ["a", "b"], [1], {}, "E580", ValueError),
    "no number": ((LORA,), ["a"], ["x"], {}, "E580", ValueError),
    "not finite": ((LORA,), ["a"], [float("nan")], {}, "E580", ValueError),
    "no such way": ((LORA, LORA), ["a", "b"], [1, 1], {"combination_type": "mean"}, "E581", ValueError),
    "no such way, of one": ((LORA,), ["a"], [1], {"combination_type": "mean"}, "E581", ValueError),
    "vectors otherwise": (
        ("ia3", "ia3"),
        ["a", "b"],
        [1, 1],
        {"combination_type": "ties", "density": 0.5},
        "E581",
        ValueError,
    ),
    "dora": (("dora", "lora"), ["b", "a"], [1, 1], {}, "E582", TypeError),
    "loha": (("loha", "loha"), ["a", "b"], [1, 1], {}, "E582", TypeError),
    "pissa": (("pissa",), ["a"], [1], {}, "E582", TypeError),
    "adalora": (("adalora(steps = 3)", LORA), ["a", "b"], [1, 1], {}, "E582", TypeError),
    "prompt": (("prompt(length = 2)", LORA), ["a", "b"], [1, 1], {}, "E582", TypeError),
    "prefix": (("prefix(length = 2)",), ["a"], [1], {}, "E582", TypeError),
    "a bias of its own": (("lora(bias = true)",), ["a"], [1], {}, "E582", TypeError),
    "a trained module": (("lora { on q_proj train lm_head }", LORA), ["a", "b"], [1, 1], {}, "E582", ValueError),
    "trained tokens": (("lora { on q_proj tokens [3, 4] }", LORA), ["b", "a"], [1, 1], {}, "E582", ValueError),
    "nothing but tokens": (("trainable_tokens { tokens [3] }",), ["a"], [1], {}, "E582", ValueError),
    "norms": (("ln_tuning",), ["a"], [1], {}, "E582", ValueError),
    "other methods": (("ia3 { on q_proj }", LORA), ["a", "b"], [1, 1], {}, "E582", TypeError),
    "ranks": ((LORA, "lora(rank = 3)"), ["a", "b"], [1, 1], {"combination_type": "linear"}, "E583", ValueError),
    "ranks at a site": (
        ("lora(rank = 2) { on q_proj, v_proj refine v_proj with rank = 3 }", "lora(rank = 3) { on q_proj, v_proj }"),
        ["a", "b"],
        [1, 1],
        {"combination_type": "ties", "density": 0.5},
        "E583",
        ValueError,
    ),
    "inputs and outputs": (
        ("ia3 { on q_proj }", "ia3(feedforward = true) { on q_proj }"),
        ["a", "b"],
        [1, 1],
        {},
        "E583",
        ValueError,
    ),
    "no density": ((LORA, LORA), ["a", "b"], [1, 1], {"combination_type": "dare_ties"}, "E584", ValueError),
    "no rank": ((LORA, LORA), ["a", "b"], [1, 1], {"svd_rank": -1}, "E584", ValueError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    methods, names, weights, options, code, kind = REFUSED[what]
    adapted = adapted_by(*methods)
    known, before = adapted._adapter_state.names(), outputs(adapted)
    with pytest.raises(UsageError) as caught:
        adapted.add_weighted_adapter(names, weights, **{"adapter_name": "new", **options})
    assert {each.code for each in caught.value.diagnostics} == {code}
    assert isinstance(caught.value, kind)
    assert adapted._adapter_state.names() == known
    assert adapted.active_adapters() == ["a"]
    assert torch.equal(outputs(adapted), before)


def test_biases_that_are_trained_are_refused():
    adapted = adapted_by("lora { on query bias all }", model=zoo.make("bert"))
    with pytest.raises(UsageError, match=re.escape("trains its own")):
        adapted.add_weighted_adapter(["a"], [1], "new")


def test_a_parameter_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x):
            return torch.einsum("noi,bi->bno", self.own, x)

    adapted = compiler.apply(Own(), "adapter a = lora(rank = 2) { on own } adapter b = lora(rank = 2) { on own }")
    with pytest.raises(ValueError, match="the parameter own"):
        adapted.add_weighted_adapter(["a", "b"], [1, 1], "new", "cat")


def test_what_diverged_is_refused():
    adapted = adapted_by(LORA, LORA)
    with torch.no_grad():
        next(adapted.adapter_bank.b.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        adapted.add_weighted_adapter(["a", "b"], [1, 1], "new")


def test_what_changes_nothing_is_told():
    adapted = adapted_by(LORA, LORA)
    with pytest.warns(UserWarning, match="density changes nothing: combination_type 'cat'"):
        adapted.add_weighted_adapter(["a", "b"], [1, 1], "one", "cat", density=0.5)
    with pytest.warns(UserWarning, match="svd_rank changes nothing: combination_type 'linear'"):
        adapted.add_weighted_adapter(["a"], [1], "two", "svd", svd_rank=1)
    with pytest.warns(UserWarning, match="majority_sign_method changes nothing: combination_type 'svd'"):
        adapted.add_weighted_adapter(["a", "b"], [1, 1], "four", majority_sign_method="frequency")
    with pytest.warns(UserWarning, match=r"nothing is dropped: density is 1\.5"):
        adapted.add_weighted_adapter(["a", "b"], [1, 1], "three", "ties", density=1.5)


def test_a_method_of_ones_own_of_that_form():
    own = """
    method thin(rank: int = 2, gain: float = 1) {
        on    linear
        param D[rank, in]  = normal saved "thin_down"
        param U[out, rank] = zeros  saved "thin_up"
        let   s = gain / rank
        W'    = W + s * (U @ D)
        {peft}
    }
    """
    plain = own.replace("{peft}", "")
    adapted = compiler.apply(zoo.make("llama"), plain + "adapter a = thin { on q_proj }")
    with pytest.raises(TypeError, match="'thin' is neither"):
        adapted.add_weighted_adapter(["a"], [1], "new")
    fields = own.replace("{peft}", "peft THIN { r = rank, lora_alpha = gain }")
    adapted = compiler.apply(
        zoo.make("llama"), fields + "adapter a = thin { on q_proj } adapter b = thin(gain = 3) { on v_proj }"
    )
    with torch.no_grad():
        for each in adapted.adapter_bank.parameters():
            each.normal_()
    adapted.eval().add_weighted_adapter(["a", "b"], [0.5, -1], "new", "cat")
    wanted = summed(adapted, {"a": 0.5, "b": -1})
    assert_close(outputs(adapted), wanted, rtol=0, atol=1e-4)


# --- combinations of specs ---

RANDOM = 'lora(rank = 2, alpha = 3, init = "random") { on q_proj, v_proj }'
OTHER = 'lora(rank = 3, init = "random", rslora = true) { on q_proj, k_proj }'
TWO = f"adapter a = {RANDOM}\nadapter b = {OTHER}\n"


def fresh(spec):
    torch.manual_seed(0)
    return compiler.apply(zoo.make("llama", num_hidden_layers=2), spec).eval()


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ("", {}),
        (', by = "cat"', {"combination_type": "cat"}),
        (', by = "ties_svd", density = 0.5', {"combination_type": "ties_svd", "density": 0.5}),
        (', by = "dare_ties_svd", density = 0.5', {"combination_type": "dare_ties_svd", "density": 0.5}),
        (", svd_rank = 4, svd_clamp = 0.9", {"svd_rank": 4, "svd_clamp": 0.9}),
    ],
)
def test_a_spec_makes_what_the_method_makes(written, options):
    """The same tensors, from the same draws; at rest and without gradients, as by hand."""
    adapted = fresh(f"{TWO}adapter new = combine(a, b, weights = [0.7, -0.4]{written})\nactivate a")
    by_hand = fresh(f"{TWO}activate a")
    by_hand.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", **options)
    assert adapted._adapter_state.names() == by_hand._adapter_state.names() == ("a", "b", "new")
    assert adapted.active_adapters() == by_hand.active_adapters() == ["a"]
    found, wanted = (each.adapter_bank.new.state_dict() for each in (adapted, by_hand))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert any(each.abs().max() > 0.01 for each in wanted.values())
    assert adapted._adapter_state.adapter("new").plan == by_hand._adapter_state.adapter("new").plan
    trained = [{name for name, each in model.named_parameters() if each.requires_grad} for model in (adapted, by_hand)]
    assert trained[0] == trained[1]
    assert not any(".new." in name for name in trained[0])


def test_a_combination_that_is_activated_is_trained_and_the_others_rest():
    adapted = fresh(TWO + 'adapter new = combine(a, b, by = "cat")\nactivate 0.5 * new')
    assert adapted._adapter_state.active == (("new", 0.5),)
    assert all(each.requires_grad for each in adapted.adapter_bank.new.parameters())
    assert not any(
        each.requires_grad for name in "ab" for each in adapted.adapter_bank.get_submodule(name).parameters()
    )
    found = outputs(adapted)
    adapted.set_adapter({"a": 0.5, "b": 0.5})
    assert_close(outputs(adapted), found, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert (outputs(adapted) - found).abs().max() > 1e-3


def test_none_is_active_unless_it_is_said():
    assert fresh(f"adapter a = {RANDOM}\nadapter less = combine(a, weights = [0.5])").active_adapters() == []


def test_combinations_of_combinations():
    adapted = fresh(
        TWO
        + 'adapter less = combine(a, weights = [0.5])\nadapter new = combine(b, less, weights = [2, -1], by = "cat")\n'
        "activate new"
    )
    found = outputs(adapted)
    assert_close(summed(adapted, {"b": 2, "a": -0.5}), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "written", "code", "place"),
    [
        (("dora { on q_proj }", LORA), "combine(b, a)", "E582", "a"),
        (("prefix(length = 2)", LORA), "combine(a, b)", "E582", "a"),
        ((LORA, "lora { on q_proj train lm_head }"), "combine(a, b)", "E582", "b"),
        (("ia3 { on q_proj }", LORA), "combine(a, b)", "E582", "= combine(a, b)"),
        (
            (LORA, "lora(rank = 3)"),
            'combine(a, b, by = "linear")',
            "E583",
            '= combine(a, b, by = "linear")',
        ),
        (("ia3", "ia3"), 'combine(a, b, by = "cat")', "E581", '= combine(a, b, by = "cat")'),
        (("ia3", "ia3"), "combine(a, b, svd_rank = 2)", "E163", "= combine(a, b, svd_rank = 2)"),
        (
            (LORA, LORA),
            'combine(a, b, svd_driver = "gesvd")',
            "E584",
            '= combine(a, b, svd_driver = "gesvd")',
        ),
        ((LORA, LORA), "combine(a, b, svd_clamp = 0.5)", "E584", "= combine(a, b, svd_clamp = 0.5)"),
    ],
)
def test_what_cannot_be_combined_is_told_where_the_spec_says_it(methods, written, code, place):
    model = zoo.make("llama", num_hidden_layers=2)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        compiler.apply(model, f"adapter a = {methods[0]}\nadapter b = {methods[1]}\nadapter new = {written}")
    (found,) = caught.value.diagnostics
    assert (found.code, found.span.line) == (code, 3)
    assert found.span.text == (f"adapter new {place}" if place.startswith("=") else place)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_name_that_a_model_cannot_have():
    with pytest.raises(UsageError, match=r"<spec>:3:1: error\[E575\]"):
        fresh(TWO + "adapter forward = combine(a)")


def test_a_spec_made_by_a_program_names_adapters_that_are_there():
    spec = compiler.read_spec(TWO + "adapter new = combine(a, b)")
    with pytest.raises(SpecError, match=r"E146.*no adapter called 'a'"):
        compiler.apply(zoo.make("llama"), replace(spec, adapters=spec.adapters[1:]))


def test_what_drops_nothing_is_told():
    with pytest.warns(UserWarning, match="nothing is dropped"):
        fresh(TWO.replace("rank = 3", "rank = 2") + 'adapter new = combine(a, b, by = "ties", density = 1)')
