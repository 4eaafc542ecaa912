"""Modules of an adapted model are the user's: called by themselves, hooked, replaced, they do what PEFT's do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from tests.parity.tree.tree import IDS, QV, first, llama, logits, pair


def hidden(model: Any) -> tuple[torch.Tensor, Any]:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    return x, model.model.rotary_emb(x, torch.arange(5)[None])


CALLS = {
    "model": lambda m: m.model(IDS),
    "decoder": lambda m: m.get_decoder()(IDS),
    "base_model": lambda m: m.base_model(IDS),
    "layer": lambda m: m.model.layers[1](hidden(m)[0], position_embeddings=hidden(m)[1]),
    "attention": lambda m: m.model.layers[0].self_attn(
        hidden(m)[0], position_embeddings=hidden(m)[1], attention_mask=None
    ),
    "linear": lambda m: m.model.layers[1].self_attn.v_proj(hidden(m)[0]),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("call", CALLS)
def test_called_by_itself(call: str, warm: bool, tmp_path: Path) -> None:
    base = llama()
    ours, theirs = pair(base, QV, tmp_path)
    if warm:
        logits(ours)
    with torch.no_grad():
        got, wanted, plain = (first(CALLS[call](each)) for each in (ours, theirs, base))
    assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embeddings_and_head(target: str, tmp_path: Path) -> None:
    ours, theirs = pair(llama(), [target], tmp_path)
    x = IDS if target == "embed_tokens" else hidden(ours)[0]
    get = "get_input_embeddings" if target == "embed_tokens" else "get_output_embeddings"
    with torch.no_grad():
        assert_close(getattr(ours, get)()(x), getattr(theirs, get)()(x), atol=1e-5, rtol=1e-5)


def test_gradients_of_a_part(tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    sums = []
    for each in (ours, theirs):
        (each.train().model(IDS)[0] ** 2).sum().backward()
        sums.append(sorted(float(p.grad.abs().sum()) for p in each.parameters() if p.grad is not None))
    assert len(sums[0]) == 8
    assert_close(torch.tensor(sums[0]), torch.tensor(sums[1]), rtol=1e-3, atol=1e-5)


WHERE = {
    "layer": lambda m: m.model.layers[1],
    "attention": lambda m: m.model.layers[0].self_attn,
    "linear": lambda m: m.model.layers[1].self_attn.q_proj,
    "norm": lambda m: m.model.layers[1].post_attention_layernorm,
}


def steer(module: nn.Module, args: Any, out: Any) -> Any:
    return (out[0] + 1.0, *out[1:]) if isinstance(out, tuple) else out + 1.0


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("where", WHERE)
def test_hooks_act_and_stop_when_removed(where: str, warm: bool, tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    plain = logits(theirs)
    if warm:
        logits(ours)
    handles = [WHERE[where](each).register_forward_hook(steer) for each in (ours, theirs)]
    wanted = logits(theirs)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    for _ in range(2):
        assert_close(logits(ours), wanted, atol=1e-5, rtol=1e-5)
    for each in handles:
        each.remove()
    assert_close(logits(ours), plain, atol=1e-5, rtol=1e-5)


def test_hooks_set_before_the_adapter(tmp_path: Path) -> None:
    base = llama()
    base.model.layers[0].mlp.register_forward_hook(steer)
    ours, theirs = pair(base, QV, tmp_path)
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_backward_hooks(tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    seen: list[list[torch.Tensor]] = [[], []]
    for each, own in zip((ours, theirs), seen, strict=True):
        WHERE["linear"](each).register_full_backward_hook(lambda m, into, out, own=own: own.append(out[0]))
        each(IDS, labels=IDS).loss.backward()
    assert_close(seen[0], seen[1], atol=1e-6, rtol=1e-4)


def test_a_forward_replaced_and_given_back(tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    plain = logits(ours)
    for each in (ours, theirs):
        each.model.layers[1].forward = lambda hidden, *args, **options: hidden
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    del ours.model.layers[1].forward
    assert torch.equal(logits(ours), plain)


def scaling(m: Any) -> None:
    for name, each in m.named_modules():
        if name.endswith("self_attn"):
            each.scaling *= 0.1


def head(m: Any) -> None:
    torch.manual_seed(5)
    m.lm_head = nn.Linear(32, 64, bias=False)


CHANGES = {
    "an attribute of attention": scaling,
    "of a norm inside": lambda m: setattr(m.model.layers[0].input_layernorm, "variance_epsilon", 1.0),
    "of a norm outside": lambda m: setattr(m.model.norm, "variance_epsilon", 1.0),
    "a module inside": lambda m: setattr(m.model.layers[0], "post_attention_layernorm", nn.Identity()),
    "a head": head,
    "fewer layers": lambda m: setattr(m.model, "layers", m.model.layers[:1]),
    "a bias": lambda m: setattr(m.model.layers[0].mlp.up_proj, "bias", nn.Parameter(torch.arange(48.0))),
    "the config": lambda m: setattr(m.config, "output_hidden_states", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_is_seen_at_the_next_call(change: str, tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    before = logits(ours)
    for each in (ours, theirs):
        CHANGES[change](each)
    with torch.no_grad():
        got, wanted = ours(IDS), theirs(IDS)
    assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    assert (got.hidden_states is None) == (wanted.hidden_states is None)
    if change != "the config":
        assert not torch.allclose(got.logits, before, atol=1e-4)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("place", ["model.layers.0.self_attn.q_proj", "lm_head"])
def test_a_module_in_the_place_of_an_adapted_one_is_adapted(place: str, hooked: bool, tmp_path: Path) -> None:
    bases, owner, leaf = (llama(), llama()), *place.rpartition(".")[::2]
    old = bases[0].get_submodule(place).weight
    torch.manual_seed(5)
    new = nn.Linear(old.shape[1], old.shape[0], bias=False)
    setattr(bases[1].get_submodule(owner), leaf, new)
    ours, _ = pair(bases[0], (*QV, "lm_head"), tmp_path)
    _, theirs = pair(bases[1], (*QV, "lm_head"), tmp_path)
    before = logits(ours)
    if hooked:
        ours.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    setattr(ours.get_submodule(owner), leaf, new)
    assert not torch.allclose(logits(ours), before, atol=1e-3)
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert_close(logits(ours.merge_and_unload()), logits(theirs), atol=1e-5, rtol=1e-5)


def test_layers_that_are_moved_keep_their_adapters_and_are_not_merged(tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    before = logits(ours)
    for each in (ours, theirs):
        each.model.layers = nn.ModuleList(reversed(each.model.layers))
    assert not torch.allclose(logits(ours), before, atol=1e-3)
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    with pytest.raises(compiler.UsageError, match="E585"):
        ours.merge_adapter()
    ours.model.layers = nn.ModuleList(reversed(ours.model.layers))
    assert torch.equal(logits(ours), before)
    ours.merge_adapter()
    assert_close(logits(ours), before, atol=1e-5, rtol=1e-5)


def test_layers_that_are_taken_out_do_not_matter_to_others(tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    ours.load_adapter(tmp_path, "other")
    for each in (ours, theirs):
        each.model.layers = each.model.layers[:1]
    ours.set_adapter({"default": 0.5, "other": 0.5})
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_module_that_is_back_is_a_region_as_it_was() -> None:
    adapted = compiler.apply(llama(), 'adapter a = lora(rank = 2, init = "random") { on all linear }').eval()
    before, own = logits(adapted), adapted.model.layers[0]
    adapted.model.layers[0] = llama().model.layers[0]
    logits(adapted)
    adapted.model.layers[0] = own
    assert torch.equal(logits(adapted), before)
    host = adapted._adapter_state.host
    assert host.regions["model.layers.0"].module is own
    assert all(each.module is adapted.get_submodule(path) for path, each in host.regions.items())
