import copy
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers as hf
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from peftc.runtime.execution.segments import Recompute, late, layer_names, segments

SPEC = "adapter a = lora(rank = 2, alpha = 4, dropout = 0.1) { on all linear }"
DECODER = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4)


def llama(layers=2):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_hidden_layers=layers, num_key_value_heads=2))


def gpt2():
    sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.2, attn_pdrop=0.2)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=None))


def t5():
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=4)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, dropout_rate=0.2, decoder_start_token_id=0, eos_token_id=None)
    )


class Running(nn.Module):
    """Keeps statistics, and no count that would tell."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = norm()

    def forward(self, x):
        return x + nn.functional.silu(self.norm(self.linear(x)))


class Net(nn.Module):
    """Blocks, with something between them that a variant changes."""

    def __init__(self, norm=nn.Identity, between=lambda x: x):
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm) for _ in range(4))
        self.between = between

    def forward(self, x):
        for block in self.blocks:
            x = self.between(block(x))
        return x


class Shared(nn.Module):
    """One block, called again and again; its first half is written to between two of the calls."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(nn.Identity)])

    def forward(self, x):
        x = self.blocks[0](x)
        y = self.blocks[0](x)
        x[:, :4].mul_(2.0)
        return self.blocks[0](y) + x


class Counts(TorchDispatchMode):
    """Counts operators as they run."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func._overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def adapt(model, spec=SPEC):
    adapted = compiler.apply(model, spec, regions="model").train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


@contextmanager
def recomputing(adapted, **options):
    adapted.gradient_checkpointing_enable(**options)
    try:
        yield
    finally:
        adapted.gradient_checkpointing_disable()


def step(adapted, *args, **kwargs):
    """A training step: the loss, every gradient, the bytes kept for them, and what ran."""
    weights = {each.untyped_storage()._cdata for each in adapted.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    adapted.zero_grad()
    program(adapted, *args, **kwargs)  # tracing runs operators too
    torch.manual_seed(3)
    with Counts() as counts:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = adapted(*args, **kwargs)
            loss = output.loss if hasattr(output, "loss") else output.square().sum()
        held = sum(size for size, _ in kept.values())
        loss.backward()
    grads = {name: each.grad.clone() for name, each in adapted.named_parameters() if each.grad is not None}
    return loss.detach(), grads, held, counts.of


def same(one, other):
    assert_close(one[0], other[0], atol=1e-6, rtol=1e-6)
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, grad in one[1].items():
        assert grad.abs().max() > 0, name
        assert_close(grad, other[1][name], atol=1e-6, rtol=1e-6)


def program(adapted, *args, **kwargs):
    engine = adapted._adapter_state.engine
    return engine.program(engine.call("", adapted._named(args, kwargs)))


def cut(adapted, *args, every=1):
    graph = program(adapted, *args)._cut.args[0]
    return segments(late(graph), layer_names(adapted), every)


@pytest.fixture(scope="module")
def models():
    made = {}
    for factory in (llama, gpt2, t5):
        torch.manual_seed(0)
        made[factory.__name__] = adapt(factory())
    return made


@pytest.fixture(scope="module")
def already():
    torch.manual_seed(0)
    model = llama(layers=1)
    model.gradient_checkpointing_enable()
    adapted = adapt(model)
    assert adapted.is_gradient_checkpointing
    assert copy.deepcopy(adapted).is_gradient_checkpointing
    yield adapted
    assert [each.gradient_checkpointing for each in model.model.layers] == [True]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return adapt(Net())


@pytest.mark.parametrize(("name", "operator", "layers"), [("llama", "silu", 2), ("gpt2", "tanh", 2), ("t5", "relu", 3)])
def test_gradients_are_the_same_and_activations_are_not_kept(models, name, operator, layers):
    """With dropout of the model's and of the adapter's; T5 in both of its stacks."""
    adapted = models[name]
    ids = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=ids, labels=ids, use_cache=False)
    plain = step(adapted, **batch)
    with recomputing(adapted):
        again = step(adapted, **batch)
    same(plain, again)
    assert again[2] < 0.45 * plain[2]
    assert (plain[3][f"aten::{operator}"], again[3][f"aten::{operator}"]) == (layers, 2 * layers)
    different = step(adapted, **{**batch, "labels": ids.flip(0)})
    assert not torch.allclose(plain[0], different[0])


def test_a_model_that_does_it_already_goes_on_doing_it(already):
    adapted = already
    adapted.enable_input_require_grads()
    ids = torch.randint(1, 60, (2, 6))
    again = step(adapted, input_ids=ids, labels=ids)
    adapted.gradient_checkpointing_disable()
    plain = step(adapted, input_ids=ids, labels=ids)
    same(plain, again)
    assert (plain[3]["aten::silu"], again[3]["aten::silu"]) == (1, 2)


def test_caches_are_returned(already):
    """Keys and values leave the layers that make them, and come back into them."""
    adapted = already
    adapted.gradient_checkpointing_disable()
    ids = torch.randint(1, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    results = []
    for context in (nullcontext(), recomputing(adapted)):
        with context:
            torch.manual_seed(3)
            cache = hf.DynamicCache(config=adapted.config)
            first = adapted(input_ids=ids, past_key_values=cache, use_cache=True)
            second = adapted(input_ids=ids, past_key_values=first.past_key_values, use_cache=True)
            keys = second.past_key_values.layers[0].keys
            assert keys.shape[2] == 10
            adapted.zero_grad()
            (second.logits.sum() + keys.sum()).backward()
            grads = {name: each.grad.clone() for name, each in adapted.named_parameters() if each.grad is not None}
            results.append((second.logits.detach(), grads))
    same(*results)


def test_it_is_off_unless_enabled_for_training_and_gradients():
    fresh, x = adapt(Net()), torch.randn(3, 8)
    fresh(x)
    assert not fresh.is_gradient_checkpointing
    assert program(fresh, x)._recomputed is None
    fresh.gradient_checkpointing_enable()
    assert fresh.is_gradient_checkpointing
    assert fresh.is_activation_checkpointing
    with torch.no_grad():
        fresh(x)
    assert program(fresh, x)._recomputed is None
    fresh(x)
    assert program(fresh, x)._recomputed is not None
    fresh.eval()
    assert step(fresh, x)[3]["aten::addmm"] == 4
    assert program(fresh, x).recomputing(Recompute()) is None


def test_every_so_many_layers(net):
    x = torch.randn(3, 8)
    plain = step(net, x)
    for every, computed in ((1, 8), (2, 6), (3, 6), (9, 5)):
        with recomputing(net, every_n_layers=every):
            again = step(net, x)
        same(plain, again)
        assert again[3]["aten::addmm"] == computed


def test_what_goes_into_a_layer_can_leave_the_device(net, monkeypatch):
    x = torch.randn(3, 8)
    plain = step(net, x)
    entered = []
    monkeypatch.setattr(
        "peftc.runtime.execution.segments.save_on_cpu", lambda **how: entered.append(how) or save_on_cpu(**how)
    )
    for offload, expected in ((True, 4), (False, 0)):
        entered.clear()
        with recomputing(net, offload=offload):
            same(plain, step(net, x))
        assert len(entered) == expected


def test_options_reach_torch(net):
    asked = []

    def contexts():
        asked.append(1)
        return nullcontext(), nullcontext()

    options = {"context_fn": contexts, "preserve_rng_state": False, "use_reentrant": False}
    with recomputing(net, gradient_checkpointing_kwargs=options):
        net(torch.randn(3, 8))
    assert len(asked) == 4


def test_what_cannot_be_followed_is_said(net):
    with pytest.warns(UserWarning, match="use_reentrant=True is not followed"):
        net.gradient_checkpointing_enable({"use_reentrant": True})
    net.gradient_checkpointing_disable()
    with pytest.raises(UsageError) as caught:
        net.gradient_checkpointing_enable({"preserve_rng": True})
    assert "E560" in str(caught.value)
    assert "preserve_rng_state" in str(caught.value)
    for count in (0, -1, 1.5, True):
        with pytest.raises(UsageError) as caught:
            net.gradient_checkpointing_enable(every_n_layers=count)
        assert "E561" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        adapt(nn.Sequential(nn.Linear(4, 4))).activation_checkpointing_enable()
    assert "E562" in str(caught.value)
    assert not net.is_gradient_checkpointing


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(8), Running])
def test_a_layer_that_updates_statistics_runs_once(norm):
    torch.manual_seed(0)
    adapted, x = adapt(Net(norm)), torch.randn(5, 8)
    before = copy.deepcopy(dict(adapted.named_buffers()))
    results = []
    for context in (nullcontext(), recomputing(adapted)):
        for name, each in adapted.named_buffers():
            each.copy_(before[name])
        with context:
            results.append((step(adapted, x), copy.deepcopy(dict(adapted.named_buffers()))))
    same(results[0][0], results[1][0])
    assert len(results[0][1]) > 4
    for name, each in results[0][1].items():
        if "norm" in name:
            assert not torch.equal(each, before[name])
        assert_close(results[1][1][name], each)
    assert cut(adapted, x) == []


def test_what_is_written_to_later_is_no_segment():
    torch.manual_seed(0)
    adapted, x = adapt(Shared(), "adapter a = lora(rank = 2) { on all linear }"), torch.randn(3, 8)
    found = cut(adapted, x)
    assert [each.layer for each in found] == ["blocks.0", "blocks.0@2"]
    plain = step(adapted, x)
    with recomputing(adapted):
        same(plain, step(adapted, x))


def test_sizes_cross_and_vary():
    adapted = adapt(Net(between=lambda x: x * x.shape[0]))
    for rows in (2, 5):
        x = torch.randn(rows, 8)
        plain = step(adapted, x)
        with recomputing(adapted):
            same(plain, step(adapted, x))


def test_computed_weights_are_made_inside():
    """An adapter's weight that no activation goes into is neither kept nor shared between segments."""
    adapted = adapt(Net(), "adapter a = loha(rank = 2) { on all linear }")
    x = torch.randn(300, 8)
    found = cut(adapted, x)
    assert len(found) == 4
    for each in found:
        assert [node.meta["val"].shape[-1:] for node in each.values if node.op != "placeholder"] in ([], [(8,)])
    plain = step(adapted, x)
    with recomputing(adapted):
        same(plain, step(adapted, x))


def test_adapters_may_change_before_the_backward_pass():
    """A segment is given the weights of its forward, not those of the moment it is computed again."""
    adapted, x = adapt(Net(), "adapter a = lora(rank = 2) { on all linear }"), torch.randn(3, 8)
    adapted.add_adapter("adapter b = lora(rank = 2) { on all linear }")
    adapted.set_adapter("a")
    plain = step(adapted, x)
    adapted.zero_grad()
    with recomputing(adapted):
        loss = adapted(x).square().sum()
        adapted.disable_adapters()
        loss.backward()
    again = {name: each.grad for name, each in adapted.named_parameters() if each.grad is not None}
    adapted.enable_adapters()
    same(plain, (loss.detach(), again))


def test_torch_compile_is_given_the_whole_graph(net):
    fresh, x = copy.deepcopy(net), torch.randn(3, 8)
    fresh.gradient_checkpointing_enable()
    compiled = torch.compile(fresh, backend="eager", fullgraph=True)
    compiled(x).sum().backward()
    assert all(each._recomputed is None for each in programs(fresh))
    fresh(x)
    assert any(each._recomputed is not None for each in programs(fresh))


def programs(adapted):
    return adapted._adapter_state.engine._tenant.specialisation.programs.values()
