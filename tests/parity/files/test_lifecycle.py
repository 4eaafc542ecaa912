"""Several adapters of one model: switching, weights, merging, saving, copying, against PEFT where it has the same."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from tests.matrix import wide

FIRST = "adapter first = lora(rank = 4, alpha = 12) { on q_proj, v_proj }"
SECOND = "adapter second = lora(rank = 2, alpha = 5) { on q_proj, up_proj, down_proj }"
THIRD = peft.LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["k_proj", "lm_head"])


@pytest.fixture
def three(zoo: Any) -> Any:
    """A Llama with three adapters of different rank and targets, the last one active."""
    with zoo.hosted("llama") as ours:
        ours.add_adapter(FIRST)
        zoo.randomise(ours, 1)
        ours.add_adapter(SECOND)
        zoo.randomise(ours, 2)
        ours.add_adapter(THIRD, "third")
        zoo.randomise(ours, 3)
        yield ours


@pytest.fixture
def theirs(zoo: Any, three: Any, tmp_path: Path) -> Any:
    """The same three in PEFT."""
    three.save_pretrained(tmp_path / "three")
    model = zoo.reference("llama", tmp_path / "three" / "first", adapter_name="first")
    for name in ("second", "third"):
        model.load_adapter(tmp_path / "three" / name, name)
    return model


def _names(model: Any, needs_gradient: bool) -> set[str]:
    bank = [(name.split(".")[1], each) for name, each in model.named_parameters() if name.startswith("adapter_bank.")]
    return {name for name, each in bank if each.requires_grad is needs_gradient}


def test_switching(three: Any, theirs: Any, zoo: Any) -> None:
    base = zoo.model("llama")
    assert three.active_adapters() == ["third"]
    for name in ("first", "second", "third", "first"):
        three.set_adapter(name)
        theirs.set_adapter(name)
        assert three.active_adapters() == [name]
        assert _names(three, True) == {name}
        assert _names(three, False) == {"first", "second", "third"} - {name}
        zoo.same(three, theirs, "llama", base=base)
    three.set_adapter("second", inference_mode=True)
    assert _names(three, True) == set()


@pytest.mark.parametrize("names", [["first", "second"], ["third", "first"], ["first", "second", "third"]])
def test_several_active(names: list[str], three: Any, theirs: Any, zoo: Any) -> None:
    three.set_adapter(names)
    theirs.base_model.set_adapter(names)
    zoo.same(three, theirs, "llama", base=zoo.model("llama"))


def test_weights(three: Any, theirs: Any, zoo: Any) -> None:
    three.set_adapter({"first": 0.5, "second": -2.0})
    theirs.base_model.set_adapter(["first", "second"])
    for name, weight in (("first", 0.5), ("second", -2.0)):
        for module in theirs.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    zoo.same(three, theirs, "llama", base=zoo.model("llama"))
    with pytest.raises(UsageError, match="activated twice"):
        three.set_adapter(["first", "first"])
    assert three.active_adapters() == ["first", "second"]


def test_unknown_names_change_nothing(three: Any, zoo: Any) -> None:
    batch = zoo.batch("llama")
    before = zoo.logits(three, batch)
    for attempt in (
        lambda: three.set_adapter("frist"),
        lambda: three.set_adapter(["first", "none"]),
        lambda: three.delete_adapter(["first", "none"]),
        lambda: three.add_adapter(FIRST),
        lambda: three.merge_adapter(["none"]),
    ):
        with pytest.raises(UsageError):
            attempt()
    assert three.active_adapters() == ["third"]
    assert torch.equal(zoo.logits(three, batch), before)


def test_disabling(three: Any, zoo: Any) -> None:
    base, batch = zoo.model("llama"), zoo.batch("llama")
    with_adapter = zoo.logits(three, batch)
    zoo.same(three, three, "llama", base=base)
    with three.disable_adapter():
        without = zoo.logits(three, batch)
        torch.testing.assert_close(without, zoo.logits(base, batch), atol=1e-5, rtol=1e-5)
        with three.disable_adapter():
            assert torch.equal(zoo.logits(three, batch), without)
        assert torch.equal(zoo.logits(three, batch), without)
    assert torch.equal(zoo.logits(three, batch), with_adapter)
    three.disable_adapters()
    with three.disable_adapter():
        assert torch.equal(zoo.logits(three, batch), without)
    assert torch.equal(zoo.logits(three, batch), without)
    three.set_adapter("first")
    assert torch.equal(zoo.logits(three, batch), without)
    three.enable_adapters()
    three.set_adapter("third")
    assert torch.equal(zoo.logits(three, batch), with_adapter)


def test_disabling_survives_an_error(three: Any, zoo: Any) -> None:
    batch = zoo.batch("llama")
    before = zoo.logits(three, batch)
    with pytest.raises(ZeroDivisionError), three.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(zoo.logits(three, batch), before)


def test_deleting(three: Any, theirs: Any, zoo: Any) -> None:
    three.set_adapter(["first", "second"])
    three.delete_adapter("first")
    assert three.active_adapters() == ["second"]
    theirs.set_adapter("second")
    zoo.same(three, theirs, "llama", base=zoo.model("llama"))
    assert not any("first" in name for name, _ in three.named_parameters())
    with pytest.raises(UsageError):
        three.set_adapter("first")
    three.add_adapter("adapter first = lora(rank = 2) { on o_proj }")
    assert three.active_adapters() == ["first"]


@pytest.mark.parametrize("names", [["first"], ["first", "second", "third"]])
def test_merging(names: list[str], three: Any, zoo: Any) -> None:
    batch, base = zoo.batch("llama", 3, 8), zoo.model("llama")
    three.set_adapter(names)
    before = zoo.logits(three, batch)
    tensors = {name: (each, each.clone()) for name, each in three.named_parameters()}
    three.merge_adapter()
    torch.testing.assert_close(zoo.logits(three, batch), before, atol=1e-5, rtol=1e-5)
    with three.disable_adapter():
        torch.testing.assert_close(zoo.logits(three, batch), zoo.logits(base, batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(zoo.logits(three, batch), before, atol=1e-5, rtol=1e-5)
    for refused in (lambda: three.merge_drift(), lambda: three.delete_adapter("first")):
        with pytest.raises(UsageError):
            refused()
    three.unmerge_adapter()
    assert torch.equal(zoo.logits(three, batch), before)
    for name, parameter in three.named_parameters():
        assert parameter is tensors[name][0]
        assert torch.equal(parameter, tensors[name][1])
    with pytest.warns(UserWarning, match="not merged"):
        three.unmerge_adapter()


def test_merge_as_peft_merges(three: Any, theirs: Any, zoo: Any) -> None:
    three.set_adapter({"first": 1.0})
    theirs.set_adapter("first")
    plain, wanted = three.merge_and_unload(), theirs.merge_and_unload()
    assert type(plain) is type(zoo.model("llama"))
    assert plain.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)
    zoo.same(plain, three, "llama", base=zoo.model("llama"))


def test_switching_unmerges(three: Any, zoo: Any) -> None:
    batch = zoo.batch("llama")
    three.set_adapter("first")
    wanted = zoo.logits(three, batch)
    three.set_adapter("third")
    three.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        three.set_adapter("first")
    assert torch.equal(zoo.logits(three, batch), wanted)


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head", "embed_tokens, q_proj"])
def test_merge_keeps_the_other_use_of_a_tied_weight(targets: str, zoo: Any, tmp_path: Path) -> None:
    with zoo.hosted("tied") as ours:
        ours.add_adapter(f"adapter a = lora(rank = 4) {{ on {targets} }}")
        zoo.randomise(ours)
        ours.save_pretrained(tmp_path / "adapter")
        zoo.same(ours, zoo.reference("tied", tmp_path / "adapter"), "tied", base=zoo.model("tied"))
        ours.merge_adapter()
        zoo.same(ours, zoo.reference("tied", tmp_path / "adapter"), "tied")
        ours.unmerge_adapter()
        plain = ours.merge_and_unload()
        zoo.same(plain, ours, "tied")
        assert plain.config.tie_word_embeddings is False
        assert zoo.model("tied").config.tie_word_embeddings is True
        plain.save_pretrained(tmp_path / "plain")
        zoo.same(type(plain).from_pretrained(tmp_path / "plain").eval(), ours, "tied")
        assert plain.get_input_embeddings().weight is not plain.get_output_embeddings().weight


def test_merge_elsewhere_keeps_the_tie(zoo: Any, tmp_path: Path) -> None:
    with zoo.hosted("tied") as ours:
        ours.add_adapter("adapter a = lora(rank = 4) { on q_proj }")
        zoo.randomise(ours)
        plain = ours.merge_and_unload()
        assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
        assert plain.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", wide(["gpt2", "t5", "bert", "moe", "gemma3"], ("gpt2", "moe")))
def test_merge_other_architectures(name: str, zoo: Any) -> None:
    more = {"gpt2": ", wte, wpe", "t5": ", shared", "bert": ", word_embeddings", "gemma3": ", embed_tokens"}
    extra = "  on mlp.experts.{gate_up_proj, down_proj}" if name == "moe" else ""
    with zoo.hosted(name) as ours:
        ours.add_adapter(f"adapter a = lora(rank = 4) {{ on all linear{more.get(name, '')}{extra} }}")
        zoo.randomise(ours, scale=0.05)
        plain = ours.merge_and_unload()
        zoo.same(plain, ours, name, base=zoo.model(name))
        zoo.same(ours.unload(), zoo.model(name), name)


def test_save_while_merged(three: Any, zoo: Any, tmp_path: Path) -> None:
    three.save_pretrained(tmp_path / "before")
    three.merge_adapter()
    three.save_pretrained(tmp_path / "merged")
    files = sorted(each.relative_to(tmp_path / "before") for each in (tmp_path / "before").rglob("*") if each.is_file())
    assert files
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_state_dict_through_a_file(three: Any, zoo: Any, tmp_path: Path) -> None:
    batch = zoo.batch("llama")
    wanted = zoo.logits(three, batch)
    torch.save(three.state_dict(), tmp_path / "state.pt")
    zoo.randomise(three, 9)
    assert not torch.equal(zoo.logits(three, batch), wanted)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(each.startswith("adapter_bank.") or each in zoo.model("llama").state_dict() for each in state)
    three.load_state_dict(state)
    assert torch.equal(zoo.logits(three, batch), wanted)
    zoo.randomise(three, 9)
    three.load_state_dict({name: each for name, each in state.items() if "adapter_bank" in name}, strict=False)
    assert torch.equal(zoo.logits(three, batch), wanted)


def test_assigned_state_is_used(zoo: Any) -> None:
    with zoo.hosted("llama") as shared:
        shared.add_adapter(FIRST)
        ours = copy.deepcopy(shared)
    batch = zoo.batch("llama")
    before = zoo.logits(ours, batch)
    state = {name: each + 0.1 if "adapter_bank" in name else each.clone() for name, each in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    after = zoo.logits(ours, batch)
    assert (after - before).abs().max() > 1e-3


def test_deepcopy_is_independent(three: Any, zoo: Any) -> None:
    batch = zoo.batch("llama")
    wanted = zoo.logits(three, batch)
    copied = copy.deepcopy(three)
    assert type(copied) is type(three)
    assert copied.active_adapters() == ["third"]
    assert torch.equal(zoo.logits(copied, batch), wanted)
    storage = {each.data_ptr() for each in three.parameters()}
    assert not storage & {each.data_ptr() for each in copied.parameters()}
    zoo.randomise(copied, 8)
    copied.delete_adapter("first")
    copied.set_adapter("second")
    assert torch.equal(zoo.logits(three, batch), wanted)
    assert three.active_adapters() == ["third"]
    assert not torch.equal(zoo.logits(copied, batch), wanted)
    zoo.randomise(three, 4)
    changed = zoo.logits(copied, batch)
    three.merge_adapter()
    assert torch.equal(zoo.logits(copied, batch), changed)


def test_deepcopy_while_merged(three: Any, zoo: Any) -> None:
    batch = zoo.batch("llama")
    before = zoo.logits(three, batch)
    three.merge_adapter()
    copied = copy.deepcopy(three)
    merged = zoo.logits(three, batch)
    assert torch.equal(zoo.logits(copied, batch), merged)
    copied.unmerge_adapter()
    assert torch.equal(zoo.logits(copied, batch), before)
    assert torch.equal(zoo.logits(three, batch), merged)


def test_moving_to_another_type(three: Any, zoo: Any) -> None:
    batch = zoo.batch("llama")
    wanted = zoo.logits(three, batch)
    moved = copy.deepcopy(three).double()
    assert {each.dtype for each in moved.parameters()} == {torch.float64}
    torch.testing.assert_close(zoo.logits(moved, batch).float(), wanted, atol=1e-5, rtol=1e-5)


def test_counts_as_peft(three: Any, theirs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second", "third"):
        three.set_adapter(name)
        theirs.set_adapter(name)
        assert three.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        three.print_trainable_parameters()
        theirs.print_trainable_parameters()
        mine, wanted = capsys.readouterr().out.splitlines()
        assert mine == wanted


def test_peft_argument_order(zoo: Any) -> None:
    with zoo.hosted("llama") as ours:
        ours.add_adapter("mine", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        assert ours.active_adapters() == ["mine"]


def test_apply_several_with_weights(zoo: Any) -> None:
    text = f"{FIRST}\n{SECOND}\nactivate first + 0.5 * second"
    ours = compiler.apply(zoo.model("llama"), text).eval()
    assert ours.active_adapters() == ["first", "second"]
    zoo.randomise(ours)
    ones = copy.deepcopy(ours)
    ones.set_adapter({"first": 1.0, "second": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.same(ours, ones, "llama", base=zoo.model("llama"))
    ones.set_adapter(["first", "second"])
    with pytest.raises(AssertionError):
        zoo.same(ours, ones, "llama")
