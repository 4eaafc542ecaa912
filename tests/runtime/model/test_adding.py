"""Adding adapters: all of it, or on an error nothing, whichever step it is that fails."""

import pytest
import torch
import transformers as hf

from peftc import compiler
from peftc.grammar.diagnostics import SpecError, UsageError
from peftc.grammar.spec.elaborate import read_spec
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.model import adding
from peftc.runtime.model.adding import (
    FreshOptions,
    PlannedAdapters,
    Values,
    add_adapters,
    make_adapter,
    plan_adapters,
    room_for,
)

IDS = torch.tensor([[1, 5, 9]])
SPEC = "adapter a = lora(rank = 2) { on all linear }"
NEW = "adapter b = lora(rank = 2) { on q_proj  tokens [12, 13] }"


class Tokenizer:
    """Of fourteen tokens, two more than the model has."""

    def __len__(self):
        return 14

    def convert_tokens_to_ids(self, token):
        return int(token)


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return compiler.apply(hf.LlamaForCausalLM(config).eval(), SPEC).eval()


def everything(model):
    state = model._adapter_state
    held = {
        name: (id(each), tuple(each.shape), each.clone()) for name, each in model.state_dict(keep_vars=True).items()
    }
    return {
        "tensors": held,
        "modules": {name: id(each) for name, each in model.named_modules()},
        "trained": [name for name, each in model.named_parameters() if each.requires_grad],
        "state": (state.names(), state.active, state.enabled, state.base.facts.fingerprint),
        "config": model.config.to_dict(),
        "sizes": (model.get_input_embeddings().num_embeddings, model.get_output_embeddings().out_features),
        "logits": model(IDS).logits.detach(),
    }


def unchanged(model, before):
    after = everything(model)
    tensors, known = after.pop("tensors"), before.pop("tensors")
    assert tensors.keys() == known.keys()
    for name, (identity, shape, value) in known.items():
        assert tensors[name][:2] == (identity, shape), name
        assert torch.equal(tensors[name][2], value), name
    assert torch.equal(after.pop("logits"), before.pop("logits"))
    assert after == before


def add(model):
    model.add_adapter(NEW, tokenizer=Tokenizer())


STEPS = {
    "measuring": (adding, "measured"),
    "making": (adding, "initial"),
    "holding": (AdapterParameters, "__init__"),
    "adding": (torch.nn.Module, "add_module"),
}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("step", STEPS)
def test_whatever_fails_nothing_has_happened(step, error, adapted, monkeypatch):
    before = everything(adapted)
    with monkeypatch.context() as patched:

        def fails(*_, **__):
            raise error("ours")

        patched.setattr(*STEPS[step], fails)
        with pytest.raises(error, match="ours"):
            add(adapted)
    unchanged(adapted, before)
    add(adapted)
    assert adapted.active_adapters() == ["b"]
    assert adapted.get_input_embeddings().num_embeddings == adapted.config.vocab_size == 14


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_activation_that_fails_leaves_the_active_ones(error, adapted, monkeypatch):
    before, state = everything(adapted), adapted._adapter_state
    known, calls = type(state).activate, []

    def fails_at_first(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise error("ours")
        return known(*args, **options)

    monkeypatch.setattr(type(state), "activate", fails_at_first)
    with pytest.raises(error, match="ours"):
        add(adapted)
    unchanged(adapted, before)


def test_a_name_that_is_taken_costs_nothing(adapted, monkeypatch):
    monkeypatch.setattr(adding, "initial", lambda *_, **__: pytest.fail("made all the same"))
    planned = plan_adapters(read_spec(SPEC).adapters, adapted._adapter_state.engine.backend.survey())
    with pytest.raises(UsageError, match=r"E511.*there already is an adapter 'a'"):
        adding.add_fresh(adapted, planned, (("a", 1.0),), FreshOptions())


def test_room_that_is_kept_and_room_that_is_given_back(adapted):
    before, base = everything(adapted), adapted._adapter_state.base
    fingerprint = base.fingerprint()

    def fails():
        with room_for(adapted, PlannedAdapters((), 20)):
            assert adapted.config.vocab_size == 20
            assert adapted(IDS).logits.shape[-1] == 20
            raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        fails()
    unchanged(adapted, before)
    with room_for(adapted, PlannedAdapters((), 20)):
        pass
    assert adapted(IDS).logits.shape[-1] == 20
    assert base.fingerprint() == fingerprint


def test_plans_are_made_for_the_vocabulary_that_is_needed(adapted):
    survey = adapted._adapter_state.engine.backend.survey()
    specs = read_spec(NEW).adapters
    planned = plan_adapters(specs, survey, Tokenizer())
    assert planned.tokens == 14
    (plan,) = planned.plans
    assert [rows.ids for rows in plan.rows] == [(12, 13)]
    assert plan_adapters(read_spec(SPEC).adapters, survey, Tokenizer()).tokens is None


def test_tensors_that_are_given_are_those_it_has(adapted):
    state = adapted._adapter_state
    (plan,) = plan_adapters(read_spec(SPEC.replace(" a ", " b ")).adapters, state.engine.backend.survey()).plans
    base = state.base.own().value
    fresh = dict(make_adapter(plan, base, Values()).items())
    given = {key: torch.full_like(tensor, 0.5, dtype=torch.float16) for key, tensor in fresh.items()}
    assert all((tensor == 0.5).all() for _, tensor in make_adapter(plan, base, Values(given)).items())
    for upcast in (True, False):  # the type is the base's, whatever the file's
        kinds = {tensor.dtype for _, tensor in make_adapter(plan, base, Values(given, upcast=upcast)).items()}
        assert kinds == {torch.float32}


@pytest.mark.parametrize("trainable", [True, False])
def test_beside_others_it_rests_unless_it_is_to_be_active(trainable, adapted):
    state = adapted._adapter_state
    planned = plan_adapters(read_spec(SPEC.replace(" a ", " b ")).adapters, state.engine.backend.survey())
    base = lambda: state.base.own().value  # noqa: E731
    add_adapters(adapted, planned, lambda: iter([Values()]), base, None, trainable=trainable)
    assert adapted.active_adapters() == ["a"]
    assert state.adapter("a").is_trainable
    assert state.adapter("b").is_trainable is trainable


@pytest.mark.parametrize(
    ("base", "code", "caret"),
    [
        ("hidden_size = 9", "E243", "hidden_size = 9"),
        ('architecture = "GPT2Model"', "E241", 'architecture = "GPT2Model"'),
        ("quantize = nf4", "E244", "quantize = nf4"),
        ('regions = "modules"', "E247", 'base { regions = "modules" }'),
    ],
)
def test_what_a_spec_says_of_its_base_is_so_already(adapted, base, code, caret):
    before = everything(adapted)
    with pytest.raises(SpecError) as caught:
        adapted.add_adapter(f"base {{ {base} }}\nadapter b = lora {{ on q_proj }}")
    (problem,) = caught.value.diagnostics
    assert (problem.code, problem.span.text) == (code, caret)
    unchanged(adapted, before)


def test_a_base_that_is_as_a_spec_says(adapted):
    """The adapter joins, with the weight that the spec activates it with."""
    base = 'base { hidden_size = 8  regions = "layers" }'
    adapted.add_adapter(f'{base}\nadapter b = lora(init = "random") {{ on q_proj }}\nactivate 0.5 * b')
    assert adapted._adapter_state.active == (("b", 0.5),)
