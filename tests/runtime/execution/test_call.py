from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from peftc.grammar.diagnostics import UsageError
from peftc.passes.foreign.transformers import Forward
from peftc.passes.ir.roles import Role, Stack
from peftc.runtime.execution.call import read_call, tensor_names

IDS = torch.ones(2, 3, dtype=torch.long)
MASK = torch.ones(2, 3)


def signature(training=False, config=None, entry="", **arguments):
    return read_call(entry, training, config, arguments).signature


@pytest.mark.parametrize(
    "other",
    [
        signature(ids=torch.zeros(7, 5, dtype=torch.long), mask=torch.ones(7, 5)),
        signature(mask=MASK, ids=IDS),
        signature(mask=MASK, ids=IDS, labels=None),
    ],
    ids=["sizes", "order", "none"],
)
def test_equal(other):
    assert other == signature(ids=IDS, mask=MASK)
    assert hash(other) == hash(signature(ids=IDS, mask=MASK))


@pytest.mark.parametrize(
    "other",
    [
        signature(ids=IDS),
        signature(ids=IDS, mask=MASK, more=MASK),
        signature(ids=IDS, mask=MASK.double()),
        signature(ids=IDS, mask=MASK[:, None]),
        signature(training=True, ids=IDS, mask=MASK),
        signature(ids=IDS, mask=MASK, use_cache=True),
        signature(ids=IDS, mask=MASK, past=DynamicCache()),
        signature(ids=IDS, mask=[MASK]),
        signature(entry="model.encoder", ids=IDS, mask=MASK),
        signature(config=SimpleNamespace(use_cache=True), ids=IDS, mask=MASK),
    ],
    ids=["fewer", "more", "type", "axes", "training", "flag", "cache", "nested", "entry", "config"],
)
def test_unequal(other):
    assert other != signature(ids=IDS, mask=MASK)


def test_flags_are_told_apart():
    kinds = [{}, {"flag": True}, {"flag": False}, {"flag": 1}]
    assert len({signature(ids=IDS, **each) for each in kinds}) == len(kinds)


def test_what_a_user_sets_on_the_config_is_seen():
    config = SimpleNamespace(output_attentions=False)
    before = signature(config=config, ids=IDS)
    config.output_attentions = True
    assert signature(config=config, ids=IDS) != before


def test_tensors_come_in_the_order_of_names():
    call = read_call("", False, None, {"b": [MASK, IDS], "a": MASK})
    assert [each is wanted for each, wanted in zip(call.tensors, (MASK, MASK, IDS), strict=True)] == [True] * 3
    paths = [path for name, form in call.signature.arguments for path in tensor_names(form, name)]
    assert paths == ["a", "b.0", "b.1"]


def test_names_of_nested_tensors():
    arguments = {"x": {"k": (MASK, 3, MASK)}, "n": 4}
    call = read_call("", False, None, arguments)
    assert [p for name, form in call.signature.arguments for p in tensor_names(form, name)] == ["x.k.0", "x.k.2"]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({"a": torch.ones(4), "b": MASK}, 2),
        ({"a": torch.ones(4)}, 1),
        ({"flag": True}, 1),
        ({"a": torch.ones(5, 1)}, 5),
    ],
)
def test_rows(arguments, rows):
    assert read_call("", False, None, arguments).rows == rows


def test_the_cache_is_kept_and_its_kind_is_in_the_signature():
    cache = DynamicCache()
    call = read_call("", False, None, {"ids": IDS, "past": cache})
    assert call.cache is cache
    assert call.signature.cache == ("decoder", False)
    both = read_call("", False, None, {"ids": IDS, "past": EncoderDecoderCache(DynamicCache(), DynamicCache())})
    assert both.signature.cache == ("encoder-decoder", False)


def test_two_caches_are_refused():
    with pytest.raises(UsageError, match=r"b: error\[E502\]: a call can take one cache"):
        read_call("", False, None, {"a": DynamicCache(), "b": DynamicCache()})


def test_an_argument_that_cannot_be_traced_is_named():
    with pytest.raises(UsageError, match=r"E501.*images is of type object"):
        read_call("", False, None, {"images": object()})


CACHED = Forward(frozenset({"ids", "cache"}), "cache")


def test_a_cache_under_an_earlier_name_is_the_same_call():
    now, before = (read_call("", False, None, {"ids": IDS, name: DynamicCache()}, CACHED) for name in ("cache", "past"))
    assert now.signature == before.signature
    assert dict(before.signature.arguments)["cache"] == ("cache",)
    other = read_call("", False, None, {"ids": IDS, "past": DynamicCache()}, Forward(frozenset({"ids"}), None))
    assert other.signature != now.signature, "a forward that takes none keeps the name, and says what it thinks of it"


def test_arguments_by_role():
    call = read_call("", False, None, {"decoder_input_ids": IDS + 1, "inputs_embeds": MASK, "attention_mask": None})
    assert call.tensor(Role.TOKENS) is call.tensor(Role.MASK) is None
    assert torch.equal(call.tensor(Role.TOKENS, Stack.DECODER), IDS + 1)
    assert call.text is MASK
    assert read_call("", False, None, {"input_ids": IDS, "inputs_embeds": MASK}).text is IDS
