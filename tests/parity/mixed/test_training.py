"""A training step of a batch whose rows have adapters of their own: each adapter has the gradient of its own rows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from tests import zoo

SPEC = """adapter one = lora(rank = 2, alpha = 8) { on q_proj, v_proj }
adapter two = lora(rank = 5) { on q_proj, up_proj }
adapter six = ia3 { on k_proj }
adapter idle = lora(rank = 2) { on q_proj }
activate one"""
NAMES = ["two", "one", "__base__", "six", "two"]
OTHERS = ["one", "six", "six", "__base__", "one"]


def made() -> Any:
    model = compiler.apply(zoo.make("llama", num_hidden_layers=2), SPEC).train()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.adapter_bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.requires_grad_(True)
    return model


def ids(seed: int) -> torch.Tensor:
    return torch.randint(3, 64, (len(NAMES), 6), generator=torch.Generator().manual_seed(seed))


def loss(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False, **more).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def separate(steps: Sequence[tuple[Sequence[str], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The gradients of each row by itself, added up."""
    model = made()
    for names, tokens in steps:
        for row, name in enumerate(names):
            if name == "__base__":
                continue
            model.set_adapter(name)
            model.set_requires_grad(["one", "two", "six", "idle"])
            loss(model, tokens[row : row + 1]).backward()
    return {name: each.grad for name, each in model.adapter_bank.named_parameters() if each.grad is not None}


def check(model: Any, wanted: dict[str, torch.Tensor]) -> None:
    for name, each in model.adapter_bank.named_parameters():
        if name in wanted and wanted[name].abs().max() > 0:
            assert each.grad is not None, name
            assert_close(each.grad, wanted[name], rtol=1e-4, atol=1e-6)
        else:
            assert each.grad is None or not each.grad.abs().max(), name
    assert all(each.grad is None for name, each in model.named_parameters() if "adapter_bank" not in name)


@pytest.mark.parametrize("active", ["one", "idle"])
def test_gradients_are_those_of_separate_steps(active: str) -> None:
    wanted, model = separate([(NAMES, ids(0))]), made()
    model.set_adapter(active)
    model.set_requires_grad(["one", "two", "six", "idle"])
    loss(model, ids(0), adapter_names=NAMES).backward()
    check(model, wanted)
    assert {name.split(".")[0] for name in wanted} == {"one", "two", "six"}


@pytest.mark.parametrize("split", [False, True], ids=["graphs", "split"])
def test_layers_are_recomputed_with_the_rows_of_their_call(split: bool) -> None:
    """Two batches of other rows wait for their backward passes."""
    wanted, model = separate([(NAMES, ids(0)), (OTHERS, ids(1))]), made()
    model.set_requires_grad(["one", "two", "six", "idle"])
    model.gradient_checkpointing_enable()
    if split:
        for layer in model.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda *_: None)
    total = loss(model, ids(0), adapter_names=NAMES) + loss(model, ids(1), adapter_names=OTHERS)
    total.backward()
    check(model, wanted)


def test_training_goes_on() -> None:
    """Weights that an optimizer wrote to are seen by the next call."""
    model = made()
    model.set_requires_grad(["one", "two", "six"])
    optimizer = torch.optim.SGD(model.adapter_bank.parameters(), 0.02)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        each = loss(model, ids(0), adapter_names=NAMES)
        each.backward()
        optimizer.step()
        losses.append(each.item())
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad():
        frozen = loss(model.eval(), ids(0), adapter_names=NAMES)
        assert frozen < losses[-1]
        model.adapter_bank.get_submodule("two").requires_grad_(False).apply(lambda each: None)
        for each in model.adapter_bank.get_submodule("two").parameters():
            each.zero_()
        assert loss(model, ids(0), adapter_names=NAMES) != frozen
