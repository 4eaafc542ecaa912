"""Which models share a trace: those of one structure, whatever their weights, and no others."""

import pytest
import torch
import transformers as hf
from torch import nn

from peftc import compiler
from tests.shared_traces import shared_traces, structure_of  # noqa: F401  (used by name, as a fixture)

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SPEC = "adapter a = lora(rank = 2) { on q_proj }"


def llama(seed=0, **more):
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1, **more)).eval()


def test_weights_make_no_difference():
    assert structure_of(llama(0)) == structure_of(llama(1))


def _hooked(model):
    model.model.norm.register_forward_hook(lambda *_: None)


def _of_a_class_of_its_own(model):
    model.lm_head.__class__ = type("Head", (nn.Linear,), {"__module__": "here"})


@pytest.mark.parametrize("change", [_hooked, _of_a_class_of_its_own, lambda each: setattr(each, "forward", print)])
def test_what_nobody_can_tell_is_not_shared(change):
    model = llama()
    change(model)
    assert structure_of(model) is None
    assert structure_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda each: each.train(),
        lambda each: each.bfloat16(),
        lambda each: each.tie_weights() or setattr(each.lm_head, "weight", each.model.embed_tokens.weight),
        lambda each: setattr(each.config, "use_cache", False),
        lambda each: setattr(each.model.layers[0].self_attn, "is_causal", False),
        lambda each: setattr(each.model.layers[0].self_attn, "scaling", 2.0),
        lambda each: each.set_attn_implementation("eager"),
        lambda each: each.requires_grad_(False),
        lambda each: setattr(each, "lm_head", nn.Linear(16, 40)),
    ],
)
def test_what_a_forward_reads_makes_a_difference(change):
    model, other = llama(), llama()
    change(other)
    assert structure_of(other) not in (None, structure_of(model))


def test_a_shared_trace_computes_with_the_weights_of_each():
    ids = torch.tensor([[1, 5, 9, 3]])
    models = [llama(seed) for seed in (0, 1)]
    adapted = [compiler.apply(each, SPEC, regions="model").eval() for each in models]
    with torch.no_grad():
        outputs = [(one(ids).logits, own(ids).logits) for one, own in zip(models, adapted, strict=True)]
    traces = [set(map(id, each._adapter_state.engine._traces.values())) for each in adapted]
    assert traces[0] == traces[1], "one trace"
    for expected, found in outputs:
        torch.testing.assert_close(found, expected)
    assert (outputs[0][0] - outputs[1][0]).abs().max() > 1e-3
