"""What `merge_drift` says is what merging does, measured here by hand; and the model is as it was."""

import math
from dataclasses import asdict

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import UsageError

BIASED = """
method shifted(rank: int = 2) {
    on     linear
    param  A[rank, in]  = normal(0, 1) saved "s_A"
    param  B[out, rank] = zeros        saved "s_B"
    param  c[out]       = zeros        saved "s_c"
    W'     = W + B @ A
    b'     = b * (1 + c) + 0.25 * c
}
adapter a = shifted { on all linear }
"""
LOW = "adapter a = lora(rank = 2, alpha = 6) { on all linear }"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 5, bias=False)

    def forward(self, x, *, other=None):
        hidden = self.drop(self.first(x)).relu()
        return {"last": self.second(hidden), "hidden": hidden, "count": torch.tensor(3)}


def adapt(spec, dtype=torch.float32, model=None):
    torch.manual_seed(0)
    adapted = compiler.apply((Net() if model is None else model).to(dtype).eval(), spec).eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapted


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(7, 6).to(dtype)


def everything(model):
    state = model._adapter_state
    return {
        "tensors": {name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()},
        "parameters": [(name, each.requires_grad) for name, each in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "state": (state.active, state.enabled, dict(state.displaced), state.base.merged),
    }


def same(before, after):
    tensors, others = before.pop("tensors"), after.pop("tensors")
    assert tensors.keys() == others.keys()
    for name, (identity, value) in tensors.items():
        assert others[name][0] == identity
        assert torch.equal(others[name][1], value)
    assert before == after


def by_name(drift):
    return {each.name: each for each in drift.tensors}


# --- weights ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_against_the_formula_by_hand(dtype):
    adapted = adapt(LOW, dtype)
    found = by_name(adapted.merge_drift())
    assert list(found) == ["first.weight", "second.weight"]
    for name in ("first", "second"):
        bank, weight = (
            adapted.adapter_bank.a.get_submodule(name),
            adapted.get_submodule(name).weight.detach(),
        )
        exact = weight.double() + 3 * bank.B.detach().double() @ bank.A.detach().double()
        kept = (weight.float() + 3 * bank.B.detach() @ bank.A.detach()).to(dtype)
        largest = float((kept.double() - exact).abs().max())
        each = found[f"{name}.weight"]
        assert each.dtype == str(dtype).removeprefix("torch.")
        assert_close(each.largest, largest, rtol=1e-2, atol=1e-6)
        assert_close(each.relative, each.largest / float(exact.abs().max()))
        if dtype != torch.float32:
            assert each.largest > 1e-4  # a lossless merge would say nothing
            assert each.relative <= torch.finfo(dtype).eps / 2
        else:
            assert each.relative < 1e-6


def test_it_is_what_merging_does():
    adapted = adapt(LOW, torch.bfloat16)
    drift = adapted.merge_drift()
    bank, weight = adapted.adapter_bank.a.first, adapted.first.weight.detach()
    exact = weight.double() + 3 * bank.B.detach().double() @ bank.A.detach().double()
    adapted.merge_adapter()
    assert drift.largest >= by_name(drift)["first.weight"].largest > 0
    assert by_name(drift)["first.weight"].largest == float((adapted.first.weight.double() - exact).abs().max())


def test_an_adapter_that_does_nothing_yet_loses_nothing():
    torch.manual_seed(0)
    adapted = compiler.apply(Net().to(torch.bfloat16).eval(), LOW)
    drift = adapted.merge_drift(inputs(torch.bfloat16))
    assert (drift.largest, drift.relative, drift.outputs.largest) == (0, 0, 0)


def test_several_adapters_with_weights_and_a_bias():
    adapted = adapt(BIASED, torch.bfloat16)
    adapted.add_adapter("adapter b = lora(rank = 1) { on first }")
    nn.init.normal_(adapted.adapter_bank.b.first.B)
    adapted.set_adapter({"a": 1.0, "b": 0.5})
    drift = adapted.merge_drift()
    assert drift.adapters == ("a", "b")
    assert set(by_name(drift)) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    bank = adapted.adapter_bank.a
    kept = (adapted.first.bias.float() * (1 + bank.first.c) + 0.25 * bank.first.c).to(torch.bfloat16).double()
    exact = adapted.first.bias.double() * (1 + bank.first.c.double()) + 0.25 * bank.first.c.double()
    assert_close(by_name(drift)["first.bias"].largest, float((kept - exact).detach().abs().max()))
    assert by_name(drift)["first.bias"].largest > 0


# --- outputs ---


def test_outputs_of_a_plain_module_by_hand():
    adapted = adapt(LOW, torch.bfloat16)
    x = inputs(torch.bfloat16)
    with torch.no_grad():
        unmerged, merged = adapted(x), adapted.merge_and_unload().eval()(x)
    apart = [(unmerged[name].double() - merged[name].double()).abs() for name in ("last", "hidden")]
    found = adapted.merge_drift(x).outputs
    assert_close(found.largest, float(max(each.max() for each in apart)))
    assert_close(found.mean, float(torch.cat([each.flatten() for each in apart]).mean()))
    assert found.largest > 0
    size = max(float(unmerged[name].double().abs().max()) for name in ("last", "hidden"))
    assert_close(found.relative, found.largest / size)
    assert (found.divergence, found.agreement) == (None, None)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return adapt(LOW.replace("on all linear", "on q_proj, up_proj"), torch.bfloat16, hf.LlamaForCausalLM(config))


@pytest.mark.parametrize("masked", [False, True])
def test_distributions_by_hand(llama, masked):
    torch.manual_seed(2)
    batch = {"input_ids": torch.randint(0, 48, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    if masked:
        batch["attention_mask"][0, :6] = 0
    before = everything(llama)
    drift = llama.merge_drift(**batch)
    same(before, everything(llama))
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        unmerged = llama(**batch).logits.double()
        llama.merge_adapter()
        merged = llama(**batch).logits.double()
        llama.unmerge_adapter()
    p, q = (functional.softmax(each, -1) for each in (unmerged, merged))
    divergence = (p * (p / q).log()).sum(-1)[seen].mean()
    assert_close(drift.outputs.divergence, float(divergence), rtol=1e-5, atol=0)
    assert drift.outputs.divergence > 0
    agreement = (unmerged.argmax(-1) == merged.argmax(-1))[seen].double().mean()
    assert drift.outputs.agreement == float(agreement)
    assert drift.outputs.largest == float((unmerged - merged).abs().max())


def test_in_float32_it_is_next_to_nothing():
    adapted = adapt(BIASED)
    drift = adapted.merge_drift(inputs())
    assert 0 < drift.relative < 1e-6
    assert drift.outputs.relative < 1e-5


def test_it_is_plain_data():
    found = asdict(adapt(LOW, torch.bfloat16).merge_drift(inputs(torch.bfloat16)))
    assert set(found) == {"adapters", "tensors", "outputs"}
    assert all(math.isfinite(each["largest"]) for each in found["tensors"])


# --- the model is as it was ---


def test_nothing_changes():
    adapted = adapt(BIASED)
    adapted.train()
    adapted.drop.eval()
    before = everything(adapted)
    adapted.merge_drift(inputs())
    same(before, everything(adapted))
    assert adapted.second.bias is None


class Copied:
    """An argument that can be copied, as `merge_drift` does for each of its two calls, so many times."""

    def __init__(self, times):
        self.left = times

    def __deepcopy__(self, memo):
        if not self.left:
            raise MemoryError("no more copies")
        self.left -= 1


@pytest.mark.parametrize("times", [0, 1])
def test_nothing_changes_when_a_call_fails(times):
    adapted = adapt(BIASED).train()
    before = everything(adapted)
    with pytest.raises(MemoryError):
        adapted.merge_drift(inputs(), other=Copied(times))
    same(before, everything(adapted))
    assert adapted.merge_drift(inputs(), other=Copied(2)).outputs is not None


@pytest.mark.parametrize(
    ("before", "code"),
    [
        (lambda model: model.merge_adapter(), "E516"),
        (lambda model: model.set_adapter([]), "E517"),
        (lambda model: model.disable_adapters(), "E521"),
    ],
)
def test_where_there_is_nothing_to_measure(before, code):
    adapted = adapt(LOW)
    before(adapted)
    with pytest.raises(UsageError) as caught:
        adapted.merge_drift(inputs())
    assert caught.value.diagnostics[0].code == code


# --- what changes the bias ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_merging_makes_is_taken_away_again(dtype):
    adapted, x = adapt(BIASED, dtype), inputs(dtype)
    before, output = everything(adapted), adapted(x)["last"]
    for _ in range(2):
        adapted.merge_adapter(safe_merge=True)
        made = adapted.second.bias
        c = adapted.adapter_bank.a.second.c
        assert torch.equal(made, (0.25 * c).to(dtype))
        assert "second.bias" in adapted.state_dict()
        assert_close(adapted(x)["last"], output, rtol=1e-1 if dtype == torch.bfloat16 else 1e-5, atol=5e-2)
        adapted.unmerge_adapter()
        same(dict(before), everything(adapted))
        assert adapted.second.bias is None
        assert torch.equal(adapted(x)["last"], output)


@pytest.mark.parametrize(
    ("tensor", "value", "named"),
    [
        ("first.c", math.inf, "first.bias"),
        ("second.c", math.nan, "second.bias"),
        ("first.A", math.nan, "first.weight"),
        ("drop.scale", math.nan, "drop.scale"),
    ],
)
def test_safe_merge_looks_at_every_tensor(tensor, value, named):
    model = Net()
    model.drop.register_parameter("scale", nn.Parameter(torch.ones(2)))
    adapted = adapt(BIASED.replace("on all linear", "on all linear train drop"), model=model)
    with torch.no_grad():
        adapted.adapter_bank.a.get_parameter(tensor).flatten()[0] = value
    before = everything(adapted)
    for action in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(UsageError, match=f"into {named}") as caught:
            action(safe_merge=True)
        assert caught.value.diagnostics[0].code == "E520"
    after = everything(adapted)
    for states in (before, after):
        states.pop("tensors")
    assert before == after
