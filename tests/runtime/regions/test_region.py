"""Regions: what is traced for how many modules, what splits one, and what its programs take for granted."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache

from peftc import compiler
from peftc.compiler import UsageError
from peftc.compiler.api import Compiler
from peftc.grammar.spec.spec import Regions
from peftc.passes.ir.cache_update import update_cache
from peftc.passes.plan.plain import plain_class
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.region import Bound, Split

IDS = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 2, 1, 30]])
SPEC = 'adapter a = lora(rank = 2, init = "random") { on all linear }'


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=layers, pad_token_id=0)).eval()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the modules that were traced."""
    found: list[str] = []
    original = Compiler.trace_region

    def trace(self: Compiler, module: nn.Module, call: Any) -> Any:
        found.append(plain_class(module).__name__)
        return original(self, module, call)

    monkeypatch.setattr(Compiler, "trace_region", trace)
    return found


def programs(adapted: Any, path: str) -> list[Bound | Split]:
    return list(adapted._adapter_state.host.local(path).programs.values())


@pytest.mark.parametrize("layers", [2, 5])
def test_a_kind_is_traced_once_whatever_the_depth(layers: int, traced: list[str]) -> None:
    base = llama(layers)
    adapted = compiler.apply(base, SPEC).eval()
    with torch.no_grad():
        adapted(IDS)
        assert traced == ["LlamaDecoderLayer"]
        adapted(IDS[:, :4]), adapted(IDS[:1])
        assert len(traced) == 2, "a batch of one is another"
        adapted.generate(IDS, max_new_tokens=4, do_sample=False)
    assert len(traced) == 4, "a text, whose mask generate makes, and one token"
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert set(traced) == {"LlamaDecoderLayer"}
    assert len(traced) == 5


def test_another_adapter_needs_no_trace(traced: list[str]) -> None:
    adapted = compiler.apply(llama(), SPEC).eval()
    with torch.no_grad():
        first = adapted(IDS).logits
        adapted.add_adapter(SPEC.replace("adapter a", "adapter b"))
        second = adapted(IDS).logits
        adapted.set_adapter("a")
        assert torch.equal(adapted(IDS).logits, first)
    assert not torch.allclose(first, second, atol=1e-4)
    assert traced == ["LlamaDecoderLayer"]


@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
def test_wherever_regions_begin_outputs_are_the_same(regions: str) -> None:
    outputs, grads = [], []
    for each in ("model", regions):
        torch.manual_seed(1)
        adapted = compiler.apply(llama(), SPEC, regions=each).eval()
        output = adapted(IDS, labels=IDS)
        output.loss.backward()
        outputs.append(output.logits)
        grads.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-6)
    assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)


def test_regions_that_are_none() -> None:
    with pytest.raises(UsageError, match="E573") as caught:
        compiler.apply(llama(), SPEC, regions="layer")  # type: ignore[arg-type]
    assert "did you mean 'layers'" in str(caught.value)


def test_the_cache_is_updated_by_itself() -> None:
    adapted = compiler.apply(llama(), SPEC).eval()
    with torch.no_grad():
        adapted(IDS)
    kinds = adapted._adapter_state.host.traces._kept.values()
    (trace,) = (each for calls in kinds for kept in calls.values() for each in kept.traces)
    (node,) = (node for node in trace.traced.graph.nodes if node.target is update_cache)
    assert [each.index for each in trace.updates] == ["self_attn.layer_idx"]
    assert str(node.args[3].target) == "region.self_attn.layer_idx", "read from each layer"


class Numbered(nn.Module):
    def __init__(self, number: int):
        super().__init__()
        self.fc, self.layer_idx = nn.Linear(4, 4), number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) / (self.layer_idx + 1)


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.blocks:
            x = each(x)
        return x


def test_a_number_that_goes_into_more_than_the_cache_makes_a_kind(traced: list[str]) -> None:
    torch.manual_seed(0)
    base, x = Net(*(Numbered(each) for each in range(3))).eval(), torch.randn(3, 4)
    adapted = compiler.apply(base, "adapter a = lora(rank = 2) { on fc }").eval()
    with torch.no_grad():
        assert_close(adapted(x), base(x))
    assert len(traced) == 4, "each layer by itself, after it was found out on the first"


def test_why_a_region_is_split() -> None:
    adapted = compiler.apply(llama(), SPEC).eval()
    handle = adapted.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        adapted(IDS)
        (split,) = programs(adapted, "model.layers.0")
        assert isinstance(split, Split)
        assert split.reason == "a hook on model.layers.0.mlp.act_fn"
        assert all(isinstance(each, Bound) for each in programs(adapted, "model.layers.0.self_attn"))
        assert isinstance(programs(adapted, "model.layers.1")[0], Bound)
        handle.remove()
        adapted(IDS)
    assert isinstance(programs(adapted, "model.layers.0")[0], Bound)


@pytest.mark.parametrize("every", [1, 2])
def test_layers_are_computed_again(every: int) -> None:
    adapted = compiler.apply(llama(4), SPEC).train()
    calls: list[int] = []
    grads = []
    for enabled in (False, True):
        if enabled:
            adapted.gradient_checkpointing_enable(every_n_layers=every)
        adapted(IDS, labels=IDS, use_cache=False)
        adapted.zero_grad()
        with torch.profiler.profile() as profile:
            adapted(IDS, labels=IDS, use_cache=False).loss.backward()
        calls.append(sum(each.count for each in profile.key_averages() if each.key == "aten::silu"))
        grads.append({name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None})
    assert calls == [4, 4 + 4 // every]
    assert_close(grads[1], grads[0])


def activations(call: Any, **options: Any) -> tuple[Any, int]:
    """What a call gives, and how often an activation is computed in it and in its backward pass."""
    with torch.profiler.profile() as profile:
        output = call(**options)
        output[0].sum().backward()
    return output, sum(each.count for each in profile.key_averages() if each.key == "aten::silu")


@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
def test_no_cache_is_made_where_layers_are_computed_again(regions: Regions) -> None:
    """As plain transformers: a model that makes caches in training has its layers recomputed all the same."""
    base = llama(4)
    adapted = compiler.apply(base, SPEC, regions=regions).train()
    assert adapted.config.use_cache
    adapted(IDS)
    for model in (adapted, base.train().requires_grad_()):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS)
        output, count = activations(model, input_ids=IDS)
        assert (output.past_key_values, count) == (None, 8)
    with pytest.warns(UserWarning, match="use_cache=True is not followed"):
        assert adapted(IDS, use_cache=True).past_key_values is None
    with torch.no_grad():
        assert adapted(IDS).past_key_values.get_seq_length() == IDS.shape[1]
    assert adapted.eval()(IDS).past_key_values.get_seq_length() == IDS.shape[1]


@pytest.mark.filterwarnings("error:use_cache")
def test_layers_that_are_given_a_cache_are_computed_once_and_say_so() -> None:
    adapted = compiler.apply(llama(4), SPEC).train()
    adapted.gradient_checkpointing_enable()
    calls = ((adapted, {"past_key_values": DynamicCache}), (adapted.model, {}))
    for call, given in calls:
        for _ in range(2):  # the first one traces
            options = {name: make() for name, make in given.items()}
            with pytest.warns(UserWarning, match="given a cache are not recomputed"):
                output, count = activations(call, input_ids=IDS, **options)
        assert (output.past_key_values.get_seq_length(), count) == (IDS.shape[1], 4)


def test_a_text_that_grows_is_served_without_asking_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding the mask is longer at every token, and no length was seen before."""
    asked: list[str] = []
    original = Host.program

    def program(self: Host, region: Any, *call: Any) -> Any:
        asked.append(region.path)
        return original(self, region, *call)

    monkeypatch.setattr(Host, "program", program)
    base = llama()
    adapted = compiler.apply(base, SPEC).eval()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = dict(attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    adapted.generate(IDS, **options)
    assert len(asked) == 4, "each layer for the text, and for a token"
    merged = compiler.apply(base, SPEC.replace("random", "default")).eval()
    merged.load_state_dict(adapted.state_dict())
    assert torch.equal(merged.merge_and_unload().generate(IDS, **options), adapted.generate(IDS, **options))
    longer = [0, 1, 2, 3, 4, 4, 4]
    adapted.generate(IDS[:, longer], **(options | dict(attention_mask=mask[:, longer])))
    assert len(asked) == 4, "and none for another text of about as many tokens"
