"""Adapters as callers mean them, with weights."""

import pytest
import torch

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from peftc.runtime.adapted.together import as_active
from tests import zoo

IDS = torch.arange(3, 11).reshape(2, 4)


def test_what_is_meant():
    assert as_active("a b") == (("a b", 1.0),)
    assert as_active(["b", "a"]) == (("b", 1.0), ("a", 1.0))
    assert as_active({"b": 2, "a": torch.tensor(-0.5)}) == (("b", 2.0), ("a", -0.5))
    assert as_active(["b", "a"], {"a": 0.5}) == (("b", 1.0), ("a", 0.5))
    assert as_active({"a": 1}, {"a": 0.5}) == (("a", 1.0),), "what is said comes before what is usual"
    assert as_active([]) == ()


@pytest.mark.parametrize("weight", ["much", None, [1], float("nan"), float("inf")])
def test_a_weight_is_a_finite_number_whoever_is_given_it(weight):
    adapted = compiler.apply(zoo.make("llama"), "adapter a = lora { on q_proj }").eval()
    before = adapted(IDS).logits
    calls = (
        lambda: adapted.set_adapter({"a": weight}),
        lambda: adapted.merge_adapter({"a": weight}),
        lambda: adapted.merge_and_unload(adapter_names={"a": weight}),
        lambda: adapted(input_ids=IDS, adapter_names=[{"a": weight}, "a"]),
    )
    for call in calls:
        with pytest.raises(UsageError, match="adapter 'a' is given the weight") as caught:
            call()
        assert caught.value.diagnostics[0].code == "E513"
        assert adapted._adapter_state.active == (("a", 1.0),)
        assert torch.equal(adapted(IDS).logits, before)
