"""Every refusal: what it says, and that nothing has changed after it. What works is tested against peft in parity."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import ModelError, SpecError, UsageError
from peftc.grammar.spec.elaborate import read_spec

SPEC = """
adapter a = lora(rank = 2, alpha = 4) { on first }
adapter b = lora(rank = 2) { on first, second  train norm }
adapter c = lora(rank = 3) { on second  train norm }
activate a
"""
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    made = compiler.apply(Net().eval(), SPEC).eval()
    for parameter in made.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return made


def snapshot(model):
    state = model._adapter_state
    return {
        "tensors": {name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()},
        "trained": [name for name, each in model.named_parameters() if each.requires_grad],
        "names": state.names(),
        "active": state.active,
        "enabled": state.enabled,
        "merged": sorted(state.displaced),
        "output": model(X),
    }


def refused(model, error, code, action):
    before = snapshot(model)
    with pytest.raises(error) as caught:
        action(model)
    after = snapshot(model)
    for name, (identity, value) in before.pop("tensors").items():
        other, now = after["tensors"][name]
        assert identity == other, name
        assert torch.equal(value, now), name
    assert set(after.pop("tensors"))
    assert torch.equal(before.pop("output"), after.pop("output"))
    assert before == after
    (found,) = caught.value.diagnostics
    assert found.code == code
    return found


CASES = {
    "unknown adapter": (lambda m: m.set_adapter("aa"), "E510", "there is no adapter 'aa'", "did you mean 'a'?"),
    "unknown among known": (lambda m: m.set_adapter(["b", "zz"]), "E510", "there is no adapter 'zz'", "a, b, c"),
    "delete unknown": (lambda m: m.delete_adapter(["a", "zz"]), "E510", "there is no adapter 'zz'", "a, b, c"),
    "merge unknown": (lambda m: m.merge_adapter(["zz"]), "E510", "there is no adapter 'zz'", "a, b, c"),
    "unload unknown": (lambda m: m.merge_and_unload(adapter_names=["zz"]), "E510", "'zz'", "a, b, c"),
    "taken": (lambda m: m.add_adapter("adapter a = lora() { on first }"), "E511", "there already is", "another name"),
    "twice": (lambda m: m.set_adapter(["a", "a"]), "E512", "adapter 'a' is activated twice", "one weight"),
    "weighted copy": (lambda m: m.set_adapter({"b": 0.5}), "E513", "adapter 'b' trains norm as a whole", "weight 1"),
    "same copy": (lambda m: m.set_adapter(["b", "c"]), "E514", "'b' and 'c' both train their own norm.", "one of them"),
    "several in a spec": (lambda m: m.add_adapter(SPEC), "E518", "not one adapter but a, b, c", "adapter_name"),
    "not in the spec": (lambda m: m.add_adapter(SPEC, "q"), "E518", "the spec has no adapter 'q'", ""),
    "not a spec": (lambda m: m.add_adapter(3), "E519", "type int does not describe an adapter", "a spec"),
    "adapted already": (lambda m: compiler.apply(m, SPEC), "E543", "adapted already", "add_adapter"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, adapted):
    action, code, message, help = CASES[case]
    found = refused(adapted, UsageError, code, action)
    assert message in found.message
    assert help in found.help


MERGED = {
    "measure": (lambda m: m.merge_drift(), "E516", "the model is merged already", "unmerge_adapter"),
    "delete": (lambda m: m.delete_adapter("a"), "E515", "'a' cannot be deleted while it is merged", "unmerge_adapter"),
    "delete several": (lambda m: m.delete_adapter(["b", "a"]), "E515", "'a' cannot be deleted", "unmerge_adapter"),
    "delete unknown": (lambda m: m.delete_adapter(["b", "zz"]), "E510", "no adapter 'zz'", "the adapters are"),
    "other values": (
        lambda m: compiler.set_peft_model_state_dict(m, {}, "a"),
        "E593",
        "'a' is merged",
        "unmerge_adapter",
    ),
}


@pytest.mark.parametrize("case", MERGED)
def test_refused_while_merged(case, adapted):
    action, code, message, help = MERGED[case]
    adapted.merge_adapter()
    found = refused(adapted, UsageError, code, action)
    assert message in found.message
    assert help in found.help


def test_nothing_to_merge(adapted):
    adapted.set_adapter([])
    found = refused(adapted, UsageError, "E517", lambda m: m.merge_adapter())
    assert "nothing to merge" in found.message


def test_merging_what_is_not_finite(adapted):
    with torch.no_grad():
        adapted.get_parameter("adapter_bank.a.first.B")[0, 0] = float("nan")
    before = snapshot(adapted)
    with pytest.raises(UsageError, match=r"E520.*NaN or infinite values into first\.weight"):
        adapted.merge_adapter(safe_merge=True)
    assert adapted._adapter_state.displaced == {}
    assert_close(adapted(X), before["output"], equal_nan=True)
    with pytest.raises(UsageError, match="E520"):
        adapted.merge_and_unload(safe_merge=True)
    adapted.merge_adapter()
    assert adapted(X).isnan().any()


def test_a_spec_that_does_not_fit(adapted):
    found = refused(adapted, SpecError, "E201", lambda m: m.add_adapter("adapter d = lora() { on frst }"))
    assert "did you mean 'first'?" in found.help


def test_unmerging_what_is_not_merged_warns(adapted):
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        adapted.unmerge_adapter()


def test_apply_refuses_what_is_no_model():
    with pytest.raises(ModelError, match=r"E405.*type dict is not a model"):
        compiler.apply({}, SPEC)


def test_a_spec_object_and_another_name(adapted):
    spec = read_spec(SPEC)
    adapted.add_adapter(spec.adapter("c"), "d")
    assert adapted._adapter_state.names() == ("a", "b", "c", "d")
    assert adapted.active_adapters() == ["d"]


def test_disabling_nests_and_comes_back_after_an_error(adapted):
    def fail():
        with adapted.disable_adapter(), adapted.disable_adapter():
            raise ValueError("ours")

    before = adapted(X)
    with pytest.raises(ValueError, match="ours"):
        fail()
    assert_close(adapted(X), before)
    adapted.disable_adapters()
    with adapted.disable_adapter():
        pass
    assert not adapted._adapter_state.enabled


def test_resizing_under_an_adapter_is_refused():
    config = hf.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    adapted = compiler.apply(hf.GPT2LMHeadModel(config), "adapter e = lora(rank = 2) { on wte }")
    weight = adapted.get_input_embeddings().weight
    with pytest.raises(UsageError, match=r"E530.*adapter 'e' adapts transformer\.wte") as caught:
        adapted.resize_token_embeddings(20)
    assert "resize the model before" in caught.value.diagnostics[0].help
    assert adapted.get_input_embeddings().weight is weight
    assert adapted.config.vocab_size == 12


def test_saving_refused(adapted, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    cases = {
        "E589": lambda m: m.save_pretrained(tmp_path / "out", selected_adapter=["a"]),
        "E541": lambda m: m.save_pretrained(file),
        "E542": lambda m: m.save_pretrained(tmp_path / "out", push_to_hub=True),
    }
    for code, action in cases.items():
        assert refused(adapted, UsageError, code, action).help
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"
