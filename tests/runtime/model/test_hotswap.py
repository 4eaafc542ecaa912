"""A saved adapter in the place of another: of any method, and of other ranks where a compiler made room."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from tests import zoo

IDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
SPECS = {
    "four": "adapter default = lora(rank = 4, alpha = 8) { on q_proj, up_proj }",
    "ten": "adapter default = lora(rank = 10, alpha = 5) { on q_proj, up_proj }",
    "elsewhere": "adapter default = lora(rank = 3) { on v_proj }",
    "scaled": "adapter default = ia3 { on k_proj, down_proj }",
    "table": "adapter default = lora(rank = 3) { on embed_tokens, q_proj, up_proj }",
    "headed": "adapter default = lora(rank = 3) { on q_proj, up_proj  train lm_head }",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Adapters in directories, and what the model gives with each."""
    found = {}
    for name, spec in SPECS.items():
        model = compiler.apply(zoo.make("llama"), spec).eval()
        torch.manual_seed(len(name))
        with torch.no_grad():
            for each in model.adapter_bank.parameters():
                each.add_(torch.randn_like(each) * 0.2)
            logits = model(input_ids=IDS).logits
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        found[name] = directory, logits
    return found


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def loaded(saved: Any, name: str) -> Any:
    return compiler.load(zoo.make("llama"), saved[name][0]).eval()


def close(model: Any, saved: Any, name: str) -> None:
    assert_close(model(input_ids=IDS).logits, saved[name][1], atol=1e-5, rtol=1e-5)


def test_of_whatever_kind(saved: Any) -> None:
    model = loaded(saved, "four")
    for name in [*SPECS, "four"]:
        model.load_adapter(saved[name][0], adapter_name="default", hotswap=True)
        close(model, saved, name)
        assert model.active_adapters() == ["default"]
        assert not any(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("name", ["ten", "scaled"])
def test_what_is_saved_is_what_was_put_in(name: str, saved: Any, tmp_path: Path) -> None:
    model = loaded(saved, "four")
    model.enable_peft_hotswap(target_rank=12)
    close(model, saved, "four")
    model.load_adapter(saved[name][0], adapter_name="default")
    close(model, saved, name)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(zoo.make("llama"), tmp_path).eval()
    assert_close(theirs(input_ids=IDS).logits, saved[name][1], atol=1e-5, rtol=1e-5)


def test_ranks_up_to_the_target_need_no_other_program(saved: Any) -> None:
    model = loaded(saved, "four")
    model.enable_peft_hotswap(target_rank=12)
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(input_ids=IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("ten", "four", "ten"):
            model.load_adapter(saved[name][0], adapter_name="default", hotswap=True)
            assert_close(call(input_ids=IDS).logits, saved[name][1], atol=1e-5, rtol=1e-5)
            weight = next(model.adapter_bank.buffers(), None) or next(model.adapter_bank.parameters())
            weight.mul_(2)  # what is written to is seen
            assert_close(call(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_call_in_between_needs_no_other_program(saved: Any) -> None:
    """Nor does one by row, which leaves the thread as it was."""
    model = loaded(saved, "four")
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(input_ids=IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(input_ids=IDS)
        model(input_ids=IDS, adapter_names=["default", "__base__"])
        assert_close(call(input_ids=IDS).logits, saved["four"][1], atol=1e-5, rtol=1e-5)


def test_room_moves_with_the_model_and_is_copied(saved: Any) -> None:
    model = loaded(saved, "four")
    model.enable_peft_hotswap(target_rank=12)
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(input_ids=IDS)
    copied = copy.deepcopy(model)
    model.to(torch.float64)
    copied.load_adapter(saved["ten"][0], adapter_name="default")
    close(copied, saved, "ten")
    assert_close(call(input_ids=IDS).logits.float(), saved["four"][1], atol=1e-5, rtol=1e-5)


def test_what_is_trained_is_trained_on(saved: Any) -> None:
    model = compiler.load(zoo.make("llama"), saved["four"][0], is_trainable=True).train()
    model.enable_peft_hotswap(target_rank=12)
    model.load_adapter(saved["ten"][0], adapter_name="default", hotswap=True)
    assert model.training
    with torch.enable_grad():
        model(input_ids=IDS).logits.square().mean().backward()
    assert all(each.grad is not None for each in model.adapter_bank.parameters())


@pytest.mark.parametrize("rank", [4, 0])
def test_there_is_no_room(rank: int, saved: Any) -> None:
    model = loaded(saved, "four")
    if rank == 0:
        for wrong in (0, 3):
            with pytest.raises(UsageError, match="E592"):
                model.enable_peft_hotswap(target_rank=wrong)
        with pytest.raises(UsageError, match=r"E592.*check_compiled"):
            model.enable_peft_hotswap(target_rank=8, check_compiled="no")
    else:
        model.enable_peft_hotswap(target_rank=rank)
        with pytest.raises(UsageError, match=r"E592.*rank of 10.*room for 4"):
            model.load_adapter(saved["ten"][0], adapter_name="default", hotswap=True)
    close(model, saved, "four")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("way", ["error", "warn", "ignore"])
def test_a_compiled_model(way: Any, saved: Any) -> None:
    model = loaded(saved, "four")
    torch.compile(model, backend="eager")(input_ids=IDS)
    match way:
        case "error":
            with pytest.raises(UsageError, match="E574"):
                model.enable_peft_hotswap(target_rank=12, check_compiled=way)
        case "warn":
            with pytest.warns(UserWarning, match="compiled already"):
                model.enable_peft_hotswap(target_rank=12, check_compiled=way)
        case _:
            model.enable_peft_hotswap(target_rank=12, check_compiled=way)
    close(model, saved, "four")


def test_nobody_to_take_the_place_of(saved: Any) -> None:
    model = loaded(saved, "four")
    with pytest.raises(UsageError, match=r"E510.*nobody"):
        model.load_adapter(saved["ten"][0], adapter_name="nobody", hotswap=True)
    close(model, saved, "four")
    model.load_adapter(saved["ten"][0], adapter_name="second")
    assert list(model.peft_config) == ["default", "second"]
