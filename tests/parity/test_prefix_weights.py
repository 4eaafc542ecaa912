"""Weights of prefixes: attention to them times a number, against the base told the same by its mask."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import _dynamo
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

from peftc import compiler
from peftc.grammar.diagnostics import UsageError

SPEC = """
adapter skill = lora(rank = 2) { on q_proj }
adapter tone  = prefix(length = 3)
adapter voice = prefix(length = 2)
activate skill + 0.5 * tone
"""
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4)
IDS = torch.tensor([[7, 3, 40, 9, 22, 5], [1, 60, 8, 8, 30, 2]])
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    return base, compiler.apply(base, SPEC).eval()


@pytest.fixture
def base(made: Any) -> Any:
    return made[0]


@pytest.fixture
def ours(made: Any) -> Iterator[Any]:
    yield made[1]
    made[1].set_adapter({"skill": 1.0, "tone": 0.5})


def _told(base: Any, ours: Any, weights: dict[str, float]) -> torch.Tensor:
    """What the base says with the prefixes as its cache, and a mask that adds the logarithms of weights."""
    parts = {name: ours.adapter_state_dict(name)["prompt_embeddings"].detach() for name in weights}
    prefix = torch.cat(list(parts.values()))
    keys, values = prefix.unflatten(1, (2, 2, 4)).permute(1, 2, 0, 3)[:, None].expand(-1, 2, -1, -1, -1)
    length, size = len(prefix), IDS.shape[1]
    logs = [math.log(weights[name]) for name, part in parts.items() for _ in part] + [0.0] * size
    places = torch.arange(length + size)
    seen = (places <= places[length:, None]) & torch.cat([torch.ones(2, length), MASK], 1).bool()[:, None, None]
    mask = torch.where(seen, torch.tensor(logs), torch.finfo(torch.float32).min)
    positions = places[length:].expand(2, -1)
    return base(IDS, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache([(keys, values)])).logits


def _said(ours: Any) -> torch.Tensor:
    with torch.no_grad():
        return ours(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


@pytest.mark.parametrize("weights", [{"tone": 0.5}, {"tone": 0.25, "voice": 3.0}, {"voice": 1.0, "tone": 0.1}])
def test_against_the_base(weights: dict[str, float], base: Any, ours: Any) -> None:
    ours.set_adapter(weights)
    with torch.no_grad():
        wanted, unweighted = (_told(base, ours, each)[MASK.bool()] for each in (weights, dict.fromkeys(weights, 1.0)))
    assert_close(_said(ours), wanted, atol=1e-6, rtol=1e-5)
    assert (wanted - unweighted).abs().max() > 1e-3
    ours.set_adapter(list(weights))
    assert_close(_said(ours), unweighted, atol=1e-6, rtol=1e-5)


def test_a_weight_of_zero_is_none(ours: Any) -> None:
    ours.set_adapter({"tone": 0.0, "skill": 1.0})
    assert not ours._adapter_state.engine._tenant.virtual.fronts
    ours.set_adapter({"voice": 0.5})
    other = _said(ours)
    ours.set_adapter({"tone": 0.0, "voice": 0.5})
    assert torch.equal(_said(ours), other)


def test_another_weight_makes_no_graph(ours: Any) -> None:
    def switched(weight: float) -> torch.Tensor:
        ours.set_adapter({"skill": 0.7, "tone": weight})
        return _said(ours)

    eager = [switched(each) for each in (0.5, 0.9, 4.0)]
    engine, ours_forward = (
        ours._adapter_state.engine,
        torch.compile(ours, fullgraph=True, dynamic=True, backend="eager"),
    )
    known = len(engine._specialisations)
    ours.set_adapter({"skill": 0.7, "tone": 0.5})
    got = []
    with torch.no_grad():
        got.append(ours_forward(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()])
        with _dynamo.config.patch(error_on_recompile=True):
            for weight in (0.9, 4.0):
                ours.set_adapter({"skill": 0.7, "tone": weight})
                got.append(ours_forward(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()])
    assert len(engine._specialisations) == known
    assert_close(got, eager)
    assert (eager[0] - eager[1]).abs().max() > 1e-4


def test_generate(ours: Any) -> None:
    """Token by token, from a cache that holds the text alone, as all at once."""
    ours.set_adapter({"tone": 0.3, "voice": 2.0})
    ids = IDS[:1]
    wanted = ids
    for _ in range(3):
        mask = torch.ones_like(wanted)
        wanted = torch.cat([wanted, ours(input_ids=wanted, attention_mask=mask).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), wanted)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_no_weight(weight: float, ours: Any) -> None:
    before = _said(ours)
    with pytest.raises(
        UsageError, match="attention to the prefix of adapter 'tone' cannot be multiplied by"
    ) as refused:
        ours.set_adapter({"tone": weight})
    assert refused.value.diagnostics[0].code == "E513"
    assert ours.active_adapters() == ["skill", "tone"]
    assert torch.equal(_said(ours), before)
