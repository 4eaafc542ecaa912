"""Wherever graphs begin (at the model, its layers or its adapted modules), the same is computed and trained."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.trace.repeats import repeated_layers
from peftc.compiler.trace.trace import Tracer
from peftc.passes.cost import cost
from peftc.passes.cost.cost import Lowering, Sizes, alternatives
from peftc.passes.ir.traced import Traced
from peftc.passes.plan.structure import AdaptedSite
from peftc.runtime.execution.call import Call
from tests import zoo

SPEC = 'adapter a = lora(rank = 2, init = "random") { on all linear }'
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (dict(num_hidden_layers=3), {}),
    "gpt2": (dict(n_layer=3), {}),
    "mistral": (dict(num_hidden_layers=3), {}),
    "moe": (dict(num_hidden_layers=3), {}),
    "bert": (dict(num_hidden_layers=3), {}),
    "t5": (dict(num_layers=3), dict(decoder_input_ids=IDS)),
    "vit": (dict(num_hidden_layers=3), {}),
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def measured(name: str, regions: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Logits, the adapters' gradients and the merged weights."""
    fields, more = MODELS[name]
    model = zoo.make(name, **fields, attn_implementation="eager")
    torch.manual_seed(0)
    adapted: Any = compiler.apply(model, SPEC, regions=regions)
    adapted.eval()
    given = dict(pixel_values=IMAGES) if name == "vit" else dict(input_ids=IDS, attention_mask=MASK, **more)
    logits = adapted(**given).logits
    logits.square().sum().backward()
    gradients = {key: each.grad for key, each in adapted.named_parameters() if each.requires_grad}
    merged = adapted.merge_and_unload()
    return logits.detach(), gradients, dict(merged.state_dict())


def lowered(lowering: Lowering, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every site lowered so, as far as it can be: by itself a region knows better how many tokens it has."""

    def cheapest(adapted: AdaptedSite, sizes: Sizes, tokens: int, *, training: bool, frozen: bool) -> Lowering:
        possible = alternatives(adapted, sizes, tokens, training=training, frozen=frozen)
        return lowering if lowering in possible else next(iter(possible))

    monkeypatch.setattr(cost, "cheapest", cheapest)


@pytest.mark.parametrize("lowering", ["pushed", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_partitions_are_of_no_consequence(name: str, lowering: Lowering, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, gradients and merged weights of layers are those of the whole model to the last bit.

    But for the gradient of what several regions read (modules, or T5's decoder layers an encoder's output), where
    adapters are pushed through: a graph folds the tokens once for all linears in it that read them, so the same numbers
    are summed in another order.
    """
    lowered(lowering, monkeypatch)
    logits, gradients, merged = measured(name, "model")
    assert all(each is not None and each.abs().sum() > 0 for each in gradients.values())
    for regions in ("layers", "modules"):
        shared = lowering == "pushed" and (regions == "modules" or name == "t5")
        found, their_gradients, their_merged = measured(name, regions)
        assert_close(found, logits, rtol=0, atol=0)
        assert their_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            most = 1e-5 * gradient.abs().max().item() if shared else 0
            assert_close(their_gradients[key], gradient, rtol=0, atol=most, msg=key)
        assert_close(their_merged, merged, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_stamping_is_of_no_consequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of the whole model in which each layer was traced computes the same to the last bit."""
    made: list[Traced] = []
    found = []
    for stamps in (True, False):

        def trace(tracer: Tracer, call: Call, stamps: bool = stamps) -> Traced:
            made.append(tracer._trace(call, None, repeated_layers(tracer._source) if stamps else {}))
            return made[-1]

        monkeypatch.setattr(Tracer, "trace", trace)  # nor is a trace shared with another test
        found.append(measured(name, "model"))
    assert [bool(each.stamped) for each in made] == [True, False]
    assert_close(found[0], found[1], rtol=0, atol=0)
