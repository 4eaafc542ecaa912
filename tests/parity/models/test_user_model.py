"""Whatever we do, the user's model is the same object with the same bits afterwards."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.grammar.diagnostics import AdapterError, ModelError, SpecError, UsageError
from tests.matrix import wide

SPEC = "adapter a = lora(rank = 4, alpha = 8) { on all linear }"
EVERYTHING = "adapter a = lora(rank = 4) { on embed_tokens, q_proj, lm_head  train norm }"


def _call(adapted: Any, zoo: Any, name: str) -> None:
    zoo.logits(adapted, zoo.batch(name))


def _train_step(adapted: Any, zoo: Any, name: str) -> None:
    adapted.train()
    trained = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    adapted(**zoo.batch(name, 2, 6), labels=zoo.labels(name, 2, 6)).loss.backward()
    optimizer.step()
    adapted.eval()


def _add_and_switch(adapted: Any, zoo: Any, name: str) -> None:
    adapted.add_adapter("adapter b = lora(rank = 2)")
    adapted.set_adapter({"a": 0.5, "b": 2.0})
    zoo.logits(adapted, zoo.batch(name))
    adapted.delete_adapter("b")
    adapted.disable_adapters()
    adapted.enable_adapters()
    adapted.set_adapter("a")


def _load_other_state(adapted: Any, zoo: Any, name: str) -> None:
    batch = zoo.batch(name)
    before = zoo.logits(adapted, batch)
    state = {
        key: each + 0.5 if "lm_head" in key or "q_proj" in key else each for key, each in adapted.state_dict().items()
    }
    adapted.load_state_dict(state)
    assert (zoo.logits(adapted, batch) - before).abs().max() > 1e-3
    heads = [adapted.get_input_embeddings().weight, adapted.get_output_embeddings().weight]
    assert (heads[0] is heads[1]) is (name == "tied")


def _merge_cycle(adapted: Any, zoo: Any, name: str) -> None:
    adapted.merge_adapter()
    with adapted.disable_adapter():
        zoo.logits(adapted, zoo.batch(name))
    adapted.unmerge_adapter()


def _through_merge(adapted: Any, zoo: Any, name: str) -> None:
    plain = adapted.merge_and_unload()
    zoo.logits(plain, zoo.batch(name))
    plain.config.use_cache = False
    adapted.unload().eval()(**zoo.batch(name))


STEPS: dict[str, Callable[[Any, Any, str], Any]] = {
    "call": _call,
    "train": _train_step,
    "switch": _add_and_switch,
    "load_state_dict": _load_other_state,
    "merge": _merge_cycle,
    "merge_and_unload": _through_merge,
    "resize": lambda adapted, zoo, name: adapted.resize_token_embeddings(140),
    "requires_grad": lambda adapted, zoo, name: adapted.requires_grad_(True),
    "tie_weights": lambda adapted, zoo, name: adapted.tie_weights(),
    "double": lambda adapted, zoo, name: adapted.double(),
    "bfloat16": lambda adapted, zoo, name: adapted.to(torch.bfloat16),
    "half": lambda adapted, zoo, name: adapted.half(),
}


@pytest.fixture(scope="module")
def models(zoo: Any) -> Any:
    """The user's model and an adapted one that shares its traces with later copies."""
    made: dict[str, tuple[nn.Module, Any]] = {}

    def make(name: str) -> tuple[nn.Module, Any]:
        if name not in made:
            model = copy.deepcopy(zoo.model(name))
            adapted = compiler.apply(model, SPEC).eval()
            zoo.logits(adapted, zoo.batch(name))
            made[name] = (model, adapted)
        return made[name]

    return make


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", wide(["llama", "tied"], ("tied",)))
def test_untouched(name: str, step: str, zoo: Any, models: Any) -> None:
    model, made = models(name)
    before = zoo.snapshot(model)
    batch = zoo.batch(name)
    outputs = zoo.logits(model, batch)
    adapted = copy.deepcopy(made)
    for mine, theirs in zip(made._base_parameters(), adapted._base_parameters(), strict=True):
        theirs.data = mine.data  # a copy that shares the user's weights, as the adapted model does
    STEPS[step](adapted, zoo, name)
    before.check()
    assert torch.equal(zoo.logits(model, batch), outputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "moe"])
def test_untouched_by_apply_and_load(name: str, zoo: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(zoo.model(name))
    model.train()
    before = zoo.snapshot(model)
    adapted = compiler.apply(model, SPEC)
    assert adapted.training
    assert isinstance(adapted, type(model))
    assert adapted.base_class is type(model)
    own = {each.data_ptr() for each in model.parameters()}
    assert own <= {each.data_ptr() for each in adapted.parameters()}
    zoo.randomise(adapted)
    adapted.save_pretrained(tmp_path)
    compiler.load(model, tmp_path)
    before.check()


def test_everything_at_once(zoo: Any) -> None:
    model = copy.deepcopy(zoo.model("llama"))
    before = zoo.snapshot(model)
    adapted = compiler.apply(model, EVERYTHING)
    zoo.randomise(adapted)
    for step in ("train", "merge", "merge_and_unload", "train"):
        STEPS[step](adapted, zoo, "llama")
    before.check()
    plain = adapted.merge_and_unload()
    assert type(plain) is type(model)
    assert set(plain.state_dict()) == set(model.state_dict())
    shared = {each.data_ptr() for each in model.parameters()}
    moved = {name for name, each in plain.named_parameters() if each.data_ptr() not in shared}
    assert moved == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)),
    }
    assert all(each.requires_grad for each in plain.parameters())


BAD = {
    "syntax": ("adapter a = lora(", SpecError),
    "method": ("adapter a = lorra(rank = 4)", SpecError),
    "selector": ("adapter a = lora(rank = 4) { on q_porj }", SpecError),
    "rank": ("adapter a = lora(rank = 1000000) { on q_proj }", SpecError),
    "base": ('base { architecture = "GPT2LMHeadModel" }\nadapter a = lora(rank = 4)', SpecError),
}


@pytest.mark.parametrize("case", BAD)
def test_untouched_by_a_bad_spec(case: str, zoo: Any) -> None:
    spec, error = BAD[case]
    model = zoo.model("llama")
    before = zoo.snapshot(model)
    with pytest.raises(error):
        compiler.apply(model, spec)
    before.check()


def test_untouched_by_a_bad_checkpoint(zoo: Any, tmp_path: Path) -> None:
    model = zoo.model("llama")
    before = zoo.snapshot(model)
    with pytest.raises(AdapterError):
        compiler.load(model, tmp_path)
    before.check()
    ours = compiler.apply(zoo.model("gpt2"), SPEC)
    ours.save_pretrained(tmp_path)
    with pytest.raises(AdapterError):
        compiler.load(model, tmp_path)
    before.check()


class Branching(nn.Module):
    """A module whose forward depends on data, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x * 2 if bool(x.sum() > 0) else x


def test_untouched_by_a_failed_trace() -> None:
    model = Branching()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    attributes = set(vars(model))
    x = torch.randn(2, 8)
    expected = model(x)
    with pytest.raises(ModelError, match="cannot be traced"):
        compiler.apply(model, "adapter a = lora(rank = 2) { on first }", example_inputs=(x,))
    assert set(vars(model)) == attributes
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_adapting_twice_is_refused(zoo: Any, models: Any) -> None:
    _, adapted = models("llama")
    with pytest.raises(UsageError, match="adapted already"):
        compiler.apply(adapted, SPEC)


def test_snapshot_notices(zoo: Any) -> None:
    """Each kind of change that the tests above rule out is one the snapshot sees."""

    def change_bit(model: nn.Module) -> None:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-3

    def replace(model: nn.Module) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    changes: list[Callable[[Any], Any]] = [
        change_bit,
        replace,
        lambda model: setattr(model, "forward", model.forward),
        lambda model: model.lm_head.weight.requires_grad_(False),
        lambda model: model.train(),
        lambda model: setattr(model.config, "use_cache", False),
        lambda model: model.lm_head.register_forward_hook(lambda *_: None),
        lambda model: model.register_buffer("extra", torch.zeros(1)),
    ]
    for change in changes:
        model = copy.deepcopy(zoo.model("llama"))
        before = zoo.snapshot(model)
        before.check()
        change(model)
        with pytest.raises(AssertionError):
            before.check()
