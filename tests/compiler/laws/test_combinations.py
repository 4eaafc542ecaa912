"""Two adapters active at once, and several clauses in one: each pair composes as said, or is refused with a reason."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc.compiler.api import adapt
from peftc.grammar.diagnostics import CheckpointError, UsageError
from peftc.passes.plan.plan import ParamKey
from peftc.runtime.merge.merge import merged_tensors
from tests import zoo

IDS = torch.arange(3, 11).reshape(2, 4)

# Methods that adapt a weight, those that put something in front, and what takes the place of tensors.
WEIGHTS = {
    "lora": "lora(rank = 2) { on q_proj, lm_head, embed_tokens }",
    "dora": "dora(rank = 2) { on q_proj, lm_head }",
    "ia3": "ia3 { on q_proj, lm_head }",
}
FRONTS = {
    "prefix": "prefix(length = 2)",
    "prompt": "prompt(length = 2)",
    "multitask": "multitask_prompt(length = 2, tasks = 3)",
    "adaption": "adaption_prompt(length = 2)",
}
REPLACING = {
    "tokens": "trainable_tokens { tokens [5, 6] }",
    "head": "lora(rank = 2) { train lm_head, norm }",
    "bias": "lora(rank = 2) { on down_proj bias all }",
}
METHODS = {**WEIGHTS, **FRONTS, **REPLACING}
PAIRS = list(itertools.combinations_with_replacement(METHODS, 2))

REFUSED = {
    ("prefix", "prompt"): "E564",  # no order of the two is said
    ("prefix", "multitask"): "E564",
    ("tokens", "tokens"): "E558",  # the same tokens
    ("head", "head"): "E514",  # the same tensors
    ("bias", "bias"): "E514",
}
# Adapted weights that are not the base's plus something compose in the order of activation, and prompts stand in it.
ORDERED = {("lora", "dora"), ("lora", "ia3"), ("dora", "dora"), ("dora", "ia3")}
ORDERED |= {("prompt", "prompt"), ("prompt", "multitask"), ("multitask", "multitask")}


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A model with two adapters of every kind, away from where they start."""
    model = zoo.make("llama", attention_bias=True)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("bias"):
                each.normal_(std=0.2)
    made = adapt(model).eval()
    for (name, text), other in itertools.product(METHODS.items(), ("", "2")):
        _add(made, f"{name}{other}", text)
    return made


@pytest.fixture(scope="module")
def alone(adapted: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in adapted._adapter_state.names():
        adapted.set_adapter(name)
        found[name] = _call(adapted)
    return found


def _add(adapted: Any, name: str, text: str) -> None:
    adapted.add_adapter(f"adapter {name} = {text}")
    with torch.no_grad():
        for each in adapted._adapter_state.adapter(name).parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each) * 0.3)


@torch.no_grad()
def _call(adapted: Any) -> torch.Tensor:
    more = {"task_ids": torch.tensor([2, 0])} if "multitask" in "".join(adapted.active_adapters()) else {}
    return adapted(input_ids=IDS, **more).logits


@torch.no_grad()
def _upon(adapted: Any, first: str, second: str) -> torch.Tensor:
    """What the second adapter makes of a base into which the first is merged."""
    state = adapted._adapter_state
    adapted.set_adapter([])
    before = state.base.swap(merged_tensors(adapted, [(state.adapter(first), 1.0)]))
    try:
        adapted.set_adapter(second)
        return _call(adapted)
    finally:
        adapted.set_adapter([])
        state.base.swap(before)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pair(first: str, second: str, adapted: Any, alone: dict[str, torch.Tensor]) -> None:
    other = f"{second}2"
    adapted.set_adapter("lora")
    if (first, second) in REFUSED:
        for pair in ([first, other], [other, first]):
            with pytest.raises(UsageError) as caught:
                adapted.set_adapter(pair)
            (found,) = caught.value.diagnostics
            assert found.code == REFUSED[first, second]
            assert repr(first) in found.message, "it says which adapters"
            assert repr(other) in found.message
            assert found.help, "and what to do"
        assert adapted.active_adapters() == ["lora"]
        assert torch.equal(_call(adapted), alone["lora"])
        return

    adapted.set_adapter([first, other])
    both = _call(adapted)
    for name in (first, other):
        assert (both - alone[name]).abs().max() > 1e-3, "each does something"
    if first in WEIGHTS or second in REPLACING:
        # What takes the place of a tensor comes first, whatever adapts it then.
        inner, outer = (other, first) if second in REPLACING else (first, other)
        torch.testing.assert_close(both, _upon(adapted, inner, outer), atol=2e-5, rtol=1e-5)
        adapted.set_adapter([first, other])
    if first not in FRONTS and second not in FRONTS:
        with torch.no_grad():
            torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, both, atol=1e-5, rtol=1e-5)
    if first == "lora" or any({first, second} <= set(kind) for kind in (WEIGHTS, FRONTS, REPLACING)):
        adapted.set_adapter([other, first])
        swapped = (_call(adapted) - both).abs().max()
        assert swapped > 3e-5 if (first, second) in ORDERED else swapped < 2e-5


CLAUSES = "train norm, lm_head bias all tokens [5, 6]"


@pytest.mark.parametrize("method", [*WEIGHTS, *FRONTS])
def test_clauses_beside_a_method(method: str, adapted: Any, tmp_path: Path) -> None:
    """One adapter with everything is what its parts are together, and is saved as one."""
    head, _, _ = {**WEIGHTS, **FRONTS}[method].partition("{")
    on = "on q_proj, v_proj" if method in WEIGHTS else ""
    parts = {
        "m": f"{head} {{ {on} }}",
        "t": "trainable_tokens { tokens [5, 6] }",
        "c": "lora { train norm, lm_head bias all }",
    }
    names = [f"{part}_{method}" for part in parts]
    state, whole = adapted._adapter_state, f"{method}_multitask" if method == "multitask" else f"{method}_all"
    try:
        _add(adapted, whole, f"{head} {{ {on} {CLAUSES} }}")
        for name, text in zip(names, parts.values(), strict=True):
            _add(adapted, name, text)
            part = state.adapter(name)
            with torch.no_grad():
                for each in dict(part.items()):
                    part.tensor(each).copy_(state.adapter(whole).tensor(ParamKey(whole, each.site, each.role)))
        adapted.set_adapter(names)
        wanted = _call(adapted)
        adapted.set_adapter(whole)
        torch.testing.assert_close(_call(adapted), wanted, atol=1e-6, rtol=1e-5)
        if method in ("lora", "dora"):  # the types whose format holds tokens
            adapted.save_pretrained(tmp_path, selected_adapters=[whole])
            adapted.load_adapter(tmp_path / whole, "again")
            adapted.set_adapter("again")
            assert torch.equal(_call(adapted), wanted)
            return
        with pytest.raises(CheckpointError) as caught:
            adapted.save_pretrained(tmp_path, selected_adapters=[whole])
        assert caught.value.diagnostics[0].code == "E326"
    finally:
        adapted.set_adapter("lora")
        adapted.delete_adapter([each for each in state.names() if each not in METHODS and each[:-1] not in METHODS])
