"""A compiler's program serves whatever adapters the rows have: names are no constants of it."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from tests import zoo

SPEC = """adapter one = lora(rank = 2, alpha = 8) { on q_proj, v_proj }
adapter two = lora(rank = 5) { on q_proj, up_proj }
adapter six = ia3 { on k_proj }
activate one"""
ORDERS = (
    ["two", "one", "__base__", "six"],
    ["six", "six", "two", "one"],
    ["one", "two", "one", "two"],
    ["__base__", "one", "__base__", "one"],
    ["two", "two", "two", "two"],
)
IDS = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(0))
SEVEN = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture
def model() -> Any:
    torch._dynamo.reset()
    made = compiler.apply(zoo.make("llama"), SPEC).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.adapter_bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


@pytest.mark.parametrize("way", ["torch.compile", "in place"])
@torch.no_grad()
def test_other_rows_need_no_other_program(model: Any, way: str) -> None:
    wanted = [model(input_ids=IDS, adapter_names=names).logits for names in ORDERS]
    plain = model(input_ids=IDS).logits
    call = model
    if way == "in place":
        model.compile(fullgraph=True, backend="aot_eager")
    else:
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(call(input_ids=IDS, adapter_names=ORDERS[0]).logits, wanted[0], atol=1e-5, rtol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names, each in zip(ORDERS, wanted, strict=True):
            assert_close(call(input_ids=IDS, adapter_names=names).logits, each, atol=1e-5, rtol=1e-5)
    assert_close(call(input_ids=IDS).logits, plain, atol=1e-5, rtol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(call(input_ids=IDS, adapter_names=ORDERS[1]).logits, wanted[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adapters_that_fit_need_no_other_program(model: Any) -> None:
    """One of a smaller rank, where there is room; one that is removed; weights that are written to."""
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(input_ids=IDS, adapter_names=ORDERS[0])
    names = ["seven", "one", "__base__", "six"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.add_adapter(SEVEN, "seven")
        model.set_adapter("one")
        compiled = call(input_ids=IDS, adapter_names=names).logits
        next(iter(model.adapter_bank.get_submodule("two").parameters())).mul_(3)
        written = call(input_ids=IDS, adapter_names=ORDERS[1]).logits
        model.delete_adapter("seven")
        last = call(input_ids=IDS, adapter_names=ORDERS[0]).logits
    assert_close(written, model(input_ids=IDS, adapter_names=ORDERS[1]).logits, atol=1e-5, rtol=1e-5)
    assert_close(last, model(input_ids=IDS, adapter_names=ORDERS[0]).logits, atol=1e-5, rtol=1e-5)
    assert_close(compiled[1:], last[1:], atol=1e-5, rtol=1e-5)
    assert (compiled[0] - last[2]).abs().max() > 1e-3


def test_training(model: Any) -> None:
    model.set_requires_grad(["one", "two", "six"])
    grads = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(input_ids=IDS, adapter_names=ORDERS[0], use_cache=False).logits.square().mean().backward()
        grads.append([each.grad for each in model.adapter_bank.parameters()])
    assert len(grads[0]) == len(grads[1]) > 6
    for one, two in zip(*grads, strict=True):
        assert one is not None
        assert_close(one, two, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_function_around_it(model: Any) -> None:
    plain = model(input_ids=IDS).logits
    around = torch.compile(lambda ids: model(input_ids=ids).logits * 2, fullgraph=True, backend="aot_eager")
    assert_close(around(IDS), plain * 2, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_exported_rows_are_constants(model: Any) -> None:
    """An exporter goes through the model as a compiler does."""
    wanted = model(input_ids=IDS, adapter_names=ORDERS[1]).logits
    given = {"input_ids": IDS, "adapter_names": ORDERS[1], "use_cache": False}
    program = torch.export.export(model, (), given, strict=False)
    assert_close(program.module()(**given).logits, wanted, atol=1e-5, rtol=1e-5)
