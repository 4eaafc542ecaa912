"""What happens between a call whose rows have adapters of their own and the next, or inside of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from peftc.runtime.mixed_batch.row_pieces import RowPieces
from tests import zoo

SPEC = """adapter one = lora(rank = 2, alpha = 8) { on q_proj, v_proj }
adapter two = lora(rank = 5) { on q_proj, up_proj }
adapter six = ia3 { on k_proj }
activate one"""
NAMES = ["two", "one", "__base__", "six"]
OTHERS = ["six", "six", "two", "one"]
IDS = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(0))


def made(spec: str = SPEC, name: str = "llama", **options: Any) -> Any:
    return zoo.noisy(compiler.apply(zoo.make(name), spec, **options).eval())


def by_row(model: Any, names: Any, **more: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, adapter_names=names, **more).logits
    return logits


def loss(model: Any, names: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, labels=IDS, use_cache=False, adapter_names=names).loss
    return found


def grads(model: Any) -> list[torch.Tensor | None]:
    found = [each.grad for each in model.adapter_bank.parameters()]
    model.zero_grad()
    return found


# --- a compiler inside ---


@pytest.mark.parametrize("what", ["layers", "model"])
@torch.no_grad()
def test_parts_that_are_compiled(what: str) -> None:
    torch._dynamo.reset()
    wanted = [by_row(made(), names) for names in (NAMES, OTHERS)]
    model = made()
    for each in model.model.layers if what == "layers" else [model.model]:
        each.compile(backend="eager")
    for names, each in zip((NAMES, OTHERS, NAMES, OTHERS), wanted * 2, strict=True):
        assert_close(by_row(model, names), each, atol=1e-5, rtol=1e-5)


# --- plain calls beside ---


@pytest.mark.parametrize("copied", ["embed_tokens", "lm_head", "norm", "tokens"])
@pytest.mark.parametrize("first", ["plain", "by row"])
def test_graphs_are_not_those_of_plain_calls(copied: str, first: str) -> None:
    """Of a module that is copied alone, and can be trained, the adapters' part says nothing of rows."""
    model = compiler.apply(zoo.make("llama"), "adapter z = lora(rank = 2) { on q_proj }\nactivate z").eval()
    tokens, whole = {"trainable_token_indices": {"embed_tokens": [5, 9]}}, {"modules_to_save": [copied]}
    more: dict[str, Any] = tokens if copied == "tokens" else whole
    for name in "cd":
        model.add_adapter(name, {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **more})
    zoo.noisy(model)
    model.set_adapter("c")
    model.set_requires_grad(["c", "d", "z"])
    calls = [lambda: model(input_ids=IDS).logits, lambda: by_row(model, ["c", "d", "c", "z"])]
    found = [call() for call in (calls if first == "plain" else calls[::-1])][:: 1 if first == "plain" else -1]
    assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert_close(found[1][2], found[0][2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1][3], found[0][3], atol=1e-3)


@torch.no_grad()
def test_written_weights_of_the_base_are_seen() -> None:
    model = made("adapter e = lora(rank = 2) { on q_proj }\nadapter n = dora(rank = 2) { on v_proj }\nactivate e")
    model.add_adapter("c", {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    names = ["c", "e", "n", "__base__"]
    by_row(model, names)
    model.lm_head.weight.mul_(2)
    model.model.layers[0].self_attn.v_proj.weight.mul_(3)
    mixed = by_row(model, names)
    for row, name in enumerate(names[:3]):
        model.set_adapter(name)
        assert_close(mixed[row], model(input_ids=IDS).logits[row], atol=1e-5, rtol=1e-5)


# --- trained, and not ---


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_not_trained_in_two_batches_before_one_backward(checkpointing: bool) -> None:
    steps = (["two", "two", "one", "six"], ["one", "six", "two", "two"])
    found = []
    for together in (False, True):
        model = made().train()
        model.set_requires_grad(["one", "two", "six"], False)
        model.set_requires_grad("one")
        if checkpointing:
            model.gradient_checkpointing_enable()
        if together:
            (loss(model, steps[0]) + loss(model, steps[1])).backward()
        else:
            for names in steps:
                loss(model, names).backward()
        found.append(grads(model))
    for one, two in zip(*found, strict=True):
        assert (one is None) is (two is None)
        if one is not None and two is not None:
            assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_a_reference_between_forward_and_backward() -> None:
    spec = "\n".join(f"adapter {name} = lora(rank = 2) {{ on q_proj }}" for name in "abc") + "\nactivate a"
    found = []
    for reference in (False, True):
        model = made(spec)
        model.set_requires_grad(["a", "b"])
        total = loss(model, ["a", "b", "__base__", "b"])
        if reference:
            with torch.no_grad():
                by_row(model, ["a", "c", "__base__", "c"])
                by_row(model, ["c", "b", "__base__", "b"])
        total.backward()
        found.append(grads(model))
    for one, two in zip(*found, strict=True):
        if one is not None:
            assert two is not None
            assert_close(one, two)


def test_frozen_after_training() -> None:
    model = made()
    model.set_requires_grad(["one", "two"])
    names = ["one", "two", "__base__", "one"]
    loss(model, names).backward()
    with torch.no_grad():
        wanted = by_row(model, names)
    model.set_requires_grad(["one", "two"], False)
    embedded = model.model.embed_tokens(IDS).detach().requires_grad_(True)
    for _ in range(2):
        logits = model(inputs_embeds=embedded, adapter_names=names).logits
        assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        logits.sum().backward()
    assert embedded.grad is not None


def test_a_regulariser_is_part_of_the_loss_however_the_rows() -> None:
    model = made("adapter ada = adalora(rank = 4, target = 2, steps = 10) { on q_proj }\nactivate ada").train()
    plain = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    with torch.no_grad():
        without = model.eval()(input_ids=IDS, labels=IDS).loss
        model.train()
    assert plain > without + 1e-3
    assert_close(loss(model, ["ada"] * 4), plain)
    mixed = loss(model, ["ada", "__base__", "ada", "ada"])
    with torch.no_grad():
        model.eval()
        assert_close(mixed - loss(model, ["ada", "__base__", "ada", "ada"]), plain - without, atol=1e-4, rtol=1e-3)


def test_padding_sends_no_gradient() -> None:
    model = made("\n".join(f"adapter {name} = lora(rank = 2) {{ on embed_tokens }}" for name in "ab") + "\nactivate a")
    model.set_requires_grad(["a", "b"])
    ids = IDS.clone()
    ids[:, :2] = 0
    model(input_ids=ids, adapter_names=["a", "b", "a", "b"]).logits.sum().backward()
    for name, each in model.adapter_bank.named_parameters():
        if each.shape[-1] == 64:
            assert each.grad is not None, name
            assert not each.grad[:, 0].any()
            assert each.grad[:, 5:].any()


# --- failures ---


@torch.no_grad()
def test_an_error_while_laying_out_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(SPEC.replace("activate one", "adapter three = lora(rank = 4) { on q_proj, v_proj }\nactivate one"))
    first, second = ["two", "one", "one", "__base__"], ["two", "three", "one", "__base__"]
    wanted, real, count = by_row(model, first), RowPieces._made, 0

    def failing(self: RowPieces, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise MemoryError
        real(self, *args)

    monkeypatch.setattr(RowPieces, "_made", failing)
    monkeypatch.setattr(RowPieces, "_written", lambda *_: False)
    with pytest.raises(MemoryError):
        by_row(model, second)
    assert torch.equal(by_row(model, first), wanted)
    assert torch.equal(by_row(model, first), wanted)


@torch.no_grad()
def test_another_is_deleted_or_moved_while_text_is_generated() -> None:
    model = made(SPEC.replace("activate one", "adapter spare = lora(rank = 2) { on q_proj }\nactivate one"))
    more = dict(max_new_tokens=6, min_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    wanted = model.generate(IDS, adapter_names=NAMES, **more)

    class Deleting(hf.LogitsProcessor):
        calls = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                model.delete_adapter("spare")
            if self.calls == 4:
                model.to(torch.float32)
                model._adapter_state.refresh()
            return scores

    found = model.generate(IDS, adapter_names=NAMES, **more, logits_processor=[Deleting()])
    for one, two in zip(found.logits, wanted.logits, strict=True):
        assert_close(one, two, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_swap_that_is_refused_at_the_end_changes_nothing(tmp_path: Path) -> None:
    model = made("adapter z = lora(rank = 2) { on q_proj }\nactivate z")
    headed = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model.add_adapter("s", headed)
    model.save_pretrained(tmp_path, selected_adapters=["s"])
    model.set_adapter(["z", "s"])
    before = model(input_ids=IDS).logits
    with pytest.raises(UsageError, match="E514"):
        model.load_adapter(tmp_path / "s", adapter_name="z", hotswap=True)
    assert model.active_adapters() == ["z", "s"]
    assert torch.equal(model(input_ids=IDS).logits, before)


@torch.no_grad()
def test_a_swap_keeps_the_numbers(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    numbers = torch.tensor([1, 0, -1, 2])
    before = by_row(model, numbers)
    model.load_adapter(tmp_path / "one", adapter_name="one", hotswap=True)
    assert torch.equal(by_row(model, numbers), before)


def test_room_is_for_what_is_not_trained() -> None:
    torch._dynamo.reset()
    model = made()
    model.set_requires_grad(["one", "two", "six"], False)
    model.enable_peft_hotswap(target_rank=8)
    call = torch.compile(model, backend="eager")
    with torch.no_grad():
        call(input_ids=IDS)
    model.set_requires_grad("one")
    model.train()
    call(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    found = [each.grad for each in model.adapter_bank.get_submodule("one").parameters()]
    assert found
    assert all(each is not None for each in found)


# --- one graph of the whole model ---


@torch.no_grad()
def test_an_encoder_of_its_own_has_the_rows() -> None:
    spec = "adapter one = lora(rank = 2) { on q, v, wo }\nadapter two = lora(rank = 5) { on q, wo }\nactivate one"
    model, names = made(spec, "t5", regions="model"), ["two", "one", "__base__", "two"]
    more = dict(max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    found = model.generate(IDS, adapter_names=names, **more).logits
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
            wanted = model.generate(IDS[row : row + 1], **more).logits
            assert_close(found[0][row], wanted[0][0], atol=1e-4, rtol=1e-4)
