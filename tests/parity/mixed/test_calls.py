"""How a call says which adapter each row has, and what is refused."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import ModelError, UsageError
from tests import zoo

SPEC = """adapter one = lora(rank = 2, alpha = 8) { on q_proj, v_proj }
adapter two = lora(rank = 5) { on q_proj, up_proj }
adapter six = ia3 { on k_proj }
activate one"""
NAMES = ["two", "one", "__base__", "six"]
IDS = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.noisy(compiler.apply(zoo.make("llama", num_hidden_layers=2), SPEC).eval())


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def by_row(model: Any, names: Any, **more: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, adapter_names=names, **more).logits
    return logits


def test_numbers_are_the_adapters_in_the_order_of_adding(model: Any) -> None:
    assert torch.equal(by_row(model, torch.tensor([1, 0, -1, 2])), by_row(model, NAMES))


@pytest.mark.parametrize("several", [("one", "two"), {"one": 0.5, "two": 2.0}, ("two", "six")], ids=str)
def test_a_row_may_have_several(model: Any, several: Any) -> None:
    mixed = by_row(model, ["six", several, "__base__", "two"])
    model.set_adapter(several)
    wanted = model(input_ids=IDS[1:2]).logits[0]
    model.set_adapter("two")
    last = model(input_ids=IDS[3:]).logits[0]
    model.set_adapter("one")
    assert_close(mixed[1], wanted, atol=1e-5, rtol=1e-5)
    assert_close(mixed[3], last, atol=1e-5, rtol=1e-5)


def test_rows_of_one_adapter_are_as_if_it_were_active(model: Any) -> None:
    mixed = by_row(model, ["two"] * 4)
    model.set_adapter("two")
    assert torch.equal(mixed, model(input_ids=IDS).logits)
    model.set_adapter("one")
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    assert torch.equal(by_row(model, ["__base__"] * 4), base)


def test_a_call_leaves_what_is_active(model: Any) -> None:
    before = model(input_ids=IDS).logits
    mixed = by_row(model, NAMES)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert torch.equal(model.forward(input_ids=IDS, adapter_names=NAMES).logits, mixed)
    assert torch.equal(model(input_ids=IDS, adapter_names=None).logits, before)
    assert model.active_adapters() == ["one"]


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (["two", "one"], "E529", "2 names, and the call 4 rows"),
        ([*NAMES, "one"], "E529", "5 names, and the call 4 rows"),
        ([], "E529", "0 names"),
        (["two", "one", "nobody", "six"], "E510", "nobody"),
        ("two", "E529", "is a str"),
        (["two", "one", 3, "six"], "E529", "has 3 for a row"),
        (torch.tensor([0, 1, 2, 3]), "E529", "numbers of adapters"),
        (torch.tensor([0.0, 1, 2, 0]), "E529", "numbers of adapters"),
        (["two", "one", ("one", "one"), "six"], "E512", "twice"),
        (["two", "one", {"six": 0.5}, "six"], "E513", "cannot be weighted"),
    ],
    ids=str,
)
def test_what_is_refused_changes_nothing(model: Any, names: Any, code: str, said: str) -> None:
    before = model(input_ids=IDS).logits
    with pytest.raises(UsageError, match=code) as found:
        by_row(model, names)
    assert said in str(found.value)
    with pytest.raises(UsageError, match=code):
        model.generate(IDS, adapter_names=names, max_new_tokens=2)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_merged_and_disabled_adapters_are_in_no_row() -> None:
    model = zoo.noisy(compiler.apply(zoo.make("llama"), SPEC).eval())
    model.merge_adapter()
    with pytest.raises(UsageError, match=r"E528.*merged"):
        by_row(model, NAMES)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(UsageError, match=r"E528.*disabled"):
        by_row(model, NAMES)
    by_row(model, NAMES)


def test_virtual_tokens_are_refused() -> None:
    spec = SPEC.replace("activate one", "adapter front = prompt(length = 3)\nactivate one")
    model = compiler.apply(zoo.make("llama"), spec).eval()
    with pytest.raises(UsageError, match=r"E528.*front"):
        by_row(model, ["front", "one", "two", "six"])
    by_row(model, NAMES)


def test_experts_that_mix_rows_are_named() -> None:
    spec = "adapter one = lora(rank = 2) { on q_proj, experts.gate_up_proj }"
    model = zoo.noisy(compiler.apply(zoo.make("moe"), spec).eval())
    with pytest.raises((ModelError, UsageError), match=r"E465|E529"):
        by_row(model, ["one", "__base__", "one", "one"])


def test_a_hook_sees_the_rows(model: Any) -> None:
    """The layer is split, and its modules have the rows."""
    wanted, seen = by_row(model, NAMES), []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *each: seen.append(each[2].shape))
    try:
        assert_close(by_row(model, NAMES), wanted, atol=1e-6, rtol=1e-6)
    finally:
        handle.remove()
    assert seen == [torch.Size((4, 6, 32))]


def test_written_weights_are_seen(model: Any) -> None:
    before = by_row(model, NAMES)
    weight = next(iter(model.adapter_bank.get_submodule("two").parameters()))
    weight.mul_(2)
    after = by_row(model, NAMES)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])
    weight.div_(2)
    assert torch.equal(by_row(model, NAMES), before)


def test_adapters_come_and_go(model: Any) -> None:
    before = by_row(model, NAMES)
    model.add_adapter("seven", {"peft_type": "LORA", "r": 9, "target_modules": ["o_proj"], "init_lora_weights": False})
    with_seven = by_row(model, ["seven", "one", "__base__", "six"])
    assert_close(with_seven[1:], before[1:], atol=1e-5, rtol=1e-5)
    model.set_adapter("seven")
    assert_close(with_seven[0], model(input_ids=IDS[:1]).logits[0], atol=1e-5, rtol=1e-5)
    model.set_adapter("one")
    model.delete_adapter("seven")
    with pytest.raises(UsageError, match="E510"):
        by_row(model, ["seven", "one", "__base__", "six"])
    assert torch.equal(by_row(model, NAMES), before)


def test_other_numbers_of_rows(model: Any) -> None:
    for rows in (2, 3, 7):
        ids = IDS[:1].repeat(rows, 1)
        names = (NAMES * 2)[:rows]
        mixed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            assert_close(mixed[row], by_row(model, [name] * 4)[0], atol=1e-5, rtol=1e-5)


def test_a_copy_has_its_own(model: Any) -> None:
    copied = copy.deepcopy(model)
    before = by_row(model, NAMES)
    for each in copied.adapter_bank.parameters():
        each.zero_()
    with copied.disable_adapter():
        base = copied(input_ids=IDS).logits
    assert_close(by_row(copied, ["two", "one", "__base__", "two"]), base, atol=1e-6, rtol=1e-6)
    assert torch.equal(by_row(model, NAMES), before)


def test_threads_have_rows_of_their_own(model: Any) -> None:
    orders = [NAMES, NAMES[::-1], ["one", "two", "six", "two"]]
    wanted = [by_row(model, names) for names in orders]
    assert not any(torch.allclose(wanted[0], each, atol=1e-5, rtol=1e-5) for each in wanted[1:])
    wrong: list[int] = []

    def ask(number: int) -> None:
        with torch.no_grad():
            for _ in range(8):
                if not torch.allclose(by_row(model, orders[number]), wanted[number], atol=1e-5, rtol=1e-5):
                    wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(orders))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


def test_inference_mode_leaves_what_can_be_trained_with(model: Any) -> None:
    with torch.inference_mode():
        inside = by_row(model, ["six", "six", "two", "__base__"])
    assert torch.equal(by_row(model, ["six", "six", "two", "__base__"]), inside)
    model.set_requires_grad("six")
    with torch.enable_grad():
        by_row(model, ["six", "six", "two", "__base__"]).sum().backward()
    model.set_requires_grad("six", False)
    assert all(each.grad is not None for each in model.adapter_bank.get_submodule("six").parameters())


@pytest.mark.parametrize("regions", ["model", "modules"])
def test_whatever_the_regions(regions: Any, model: Any) -> None:
    other = compiler.apply(zoo.make("llama", num_hidden_layers=2), SPEC, regions=regions).eval()
    other.load_state_dict(model.state_dict())
    assert_close(by_row(other, NAMES), by_row(model, NAMES), atol=1e-5, rtol=1e-5)
    assert_close(other(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_bfloat16_rows(model: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    mixed = by_row(half, NAMES)
    assert mixed.dtype is torch.bfloat16
    for row, name in enumerate(NAMES):
        assert_close(mixed[row], by_row(half, [name] * 4)[row], atol=0.1, rtol=0.05)


def test_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = by_row(model, NAMES)
        for row, name in enumerate(NAMES):
            assert_close(mixed[row], by_row(model, [name] * 4)[row], atol=0.1, rtol=0.05)
