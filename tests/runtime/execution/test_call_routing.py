"""Which call a graph with virtual tokens takes for a call of the user's."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import ModelError, UsageError
from peftc.passes.foreign.transformers import Forward
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import Term, VirtualTokens
from peftc.runtime.execution import virtual
from peftc.runtime.execution.call import Call, read_call
from peftc.runtime.execution.call_routing import positions_of, widened
from peftc.runtime.execution.virtual import Virtual

IDS = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
CACHING = Forward(frozenset({"input_ids", "attention_mask", "position_ids", "cache"}), "cache")


@dataclass
class Runner:
    """A model that only takes calls apart; run, it leaves in its cache what virtual tokens would."""

    caches: bool = True
    encoder_decoder: bool = False
    positions: int | None = None
    forward: Forward = CACHING
    owner: object = "us"
    ran: list[Any] = field(default_factory=list)

    @property
    def model(self):
        model = nn.Module()
        model.config = SimpleNamespace(is_encoder_decoder=self.encoder_decoder, use_cache=True)
        return model

    def plain_call(self, entry, arguments):
        return read_call(entry, False, self.model.config, arguments)

    def takes_cache(self, call: Call) -> bool:
        return self.caches

    def run(self, entry, arguments):
        self.ran.append(arguments)
        cache = filled()
        virtual.carry(cache, self.owner, (torch.full((2, 1, 3, 4), 7.0),))
        return {"logits": None, "whatever it is called": cache}


def filled(rows=2, length=4):
    cache = DynamicCache()
    cache.update(torch.zeros(rows, 1, length, 4), torch.zeros(rows, 1, length, 4), 0)
    return cache


def front(kind, length=3, **more):
    return VirtualTokens(Site("embed", "weight", kind, 8, 9), Term(0, algebra.Param("P"), (), ()), length, **more)


def ours(*fronts):
    return Virtual(fronts, "us")


def given(call):
    return dict(zip(call.signature.tensor_names, call.tensors, strict=True))


PREFIX, PROMPT = ours(front("cache")), ours(front("prompt"))


@pytest.mark.parametrize("ahead", [ours(), ours(front("attention"))])
def test_nothing_in_front_of_the_tokens(ahead):
    engine = Runner()
    call = widened(engine, ahead, "", {"input_ids": IDS})
    plain = engine.plain_call("", {"input_ids": IDS})
    assert (call.signature, call.cache, call.extra) == (plain.signature, None, ())


def test_a_prefix_before_the_callers_cache():
    cache = filled()
    call = widened(Runner(), PREFIX, "", {"input_ids": IDS, "past_key_values": cache})
    assert call.signature.mode == virtual.PREFIX
    assert call.cache is cache
    assert call.keeps_cache


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_prefix_before_an_empty_cache(use_cache):
    call = widened(Runner(), PREFIX, "", {"input_ids": IDS, "use_cache": use_cache})
    assert call.signature.mode == virtual.PREFIX
    assert type(call.cache) is DynamicCache
    assert call.keeps_cache == use_cache, "who asked for no cache gets none back"


def test_a_prefix_of_a_decoder_beside_an_encoder():
    engine = Runner(encoder_decoder=True)
    call = widened(engine, PREFIX, "", {"input_ids": IDS, "decoder_input_ids": IDS})
    assert type(call.cache) is EncoderDecoderCache
    encoder = widened(engine, PREFIX, "encoder", {"input_ids": IDS})
    assert (encoder.signature.mode, encoder.cache) == ("", None), "the encoder has none"


def test_a_prefix_in_a_model_that_keeps_no_cache():
    call = widened(Runner(caches=False), PREFIX, "", {"input_ids": IDS})
    assert (call.signature.mode, call.cache) == (virtual.HEADS, None)


@pytest.mark.parametrize(("positions", "fits"), [(None, True), (7, True), (6, False)])
def test_positions_are_enough(positions, fits):
    engine = Runner(caches=False, positions=positions)
    if fits:
        assert widened(engine, PREFIX, "", {"input_ids": IDS}).signature.mode == virtual.HEADS
        return
    with pytest.raises(ModelError, match="a prefix of 3 before 4 tokens: the model has positions for 6") as refused:
        widened(engine, PREFIX, "", {"input_ids": IDS})
    assert refused.value.diagnostics[0].code == "E423"
    where = {"input_ids": IDS, "position_ids": torch.zeros_like(IDS)}
    assert widened(engine, PREFIX, "", where), "whoever says the positions knows them"


def test_a_prompt_begins_a_text():
    call = widened(Runner(), PROMPT, "", {"input_ids": IDS, "attention_mask": MASK})
    assert (call.signature.mode, call.extra, call.owner) == (virtual.START, (), "us")
    assert given(call)["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    empty = widened(Runner(), PROMPT, "", {"input_ids": IDS, "past_key_values": DynamicCache()})
    assert empty.signature.mode == virtual.START


@pytest.mark.parametrize(
    "engine",
    [Runner(forward=Forward(frozenset({"input_ids", "attention_mask", "cache"}), "cache")), Runner(caches=False)],
    ids=["none", "text"],
)
def test_positions_are_left_to_models_that_take_none_or_generate_nothing(engine):
    call = widened(engine, PROMPT, "", {"input_ids": IDS, "attention_mask": MASK})
    assert "position_ids" not in given(call)


def test_positions_as_peft_has_them():
    """None are worked out, and those of the call are not used."""
    compatible = ours(front("prompt", compatible=True))
    call = widened(Runner(), compatible, "", {"input_ids": IDS, "attention_mask": MASK, "position_ids": IDS})
    assert set(given(call)) == {"input_ids", "attention_mask"}


def test_a_text_goes_on_with_what_the_prompt_left():
    cache, left = filled(), (torch.ones(1, 1, 3, 4),)
    virtual.carry(cache, "us", left)
    engine = Runner()
    call = widened(engine, PROMPT, "", {"input_ids": IDS, "past_key_values": cache})
    assert (call.signature.mode, call.extra, engine.ran) == (virtual.CARRY, left, [])


@pytest.mark.parametrize("before", [None, "them"])
def test_a_cache_that_began_without_the_prompt(before):
    """What it would have left is found by one token, and kept."""
    cache, engine = filled(), Runner()
    if before is not None:
        virtual.carry(cache, before, (torch.zeros(1, 1, 3, 4),))
    arguments = {"input_ids": IDS, "attention_mask": MASK, "past_key_values": cache}
    call = widened(engine, PROMPT, "", arguments)
    assert (call.signature.mode, call.extra[0].unique().tolist()) == (virtual.CARRY, [7.0])
    (asked,) = engine.ran
    assert asked["input_ids"].tolist() == [[0], [3]]
    assert set(asked) == {"input_ids", "use_cache"}
    assert virtual.carried_by(cache, "us", 2)[0] is call.extra[0]
    widened(engine, PROMPT, "", arguments)
    assert len(engine.ran) == 1
    assert cache.get_seq_length() == 4, "the caller's cache holds its own tokens"


TASKS = ours(front("prompt", tasks=3))


def test_tasks_are_given_to_the_graph():
    call = widened(Runner(), TASKS, "", {"input_ids": IDS, "task_ids": [2, 0]})
    (tasks,) = call.extra
    assert (tasks.tolist(), tasks.dtype) == ([2, 0], torch.int64)
    assert "task_ids" not in given(call)
    assert widened(Runner(), TASKS, "", {"input_ids": IDS, "task_ids": [1]}).extra[0].tolist() == [1, 1]
    engine = Runner()
    widened(engine, TASKS, "", {"input_ids": IDS, "task_ids": [2, 0], "past_key_values": filled()})
    assert engine.ran[0]["task_ids"].tolist() == [2, 0], "what is left depends on the task"


def test_tasks_that_are_refused():
    for tasks, says in (([0, 1, 2], "3 tasks were given for 2 rows"), (None, "the active adapter has tasks")):
        with pytest.raises(UsageError, match=says) as refused:
            widened(Runner(), TASKS, "", {"input_ids": IDS, "task_ids": tasks})
        assert refused.value.diagnostics[0].code == "E563"
    with pytest.raises(UsageError, match="no active adapter has tasks"):
        widened(Runner(), PREFIX, "", {"input_ids": IDS, "task_ids": [0, 0]})


def test_a_prompt_of_an_encoder():
    """Every call has it; one that gives what the encoder made has no tokens to choose prompts for."""
    engine = Runner(encoder_decoder=True)
    tokens = {"input_ids": IDS, "decoder_input_ids": IDS, "task_ids": [2, 0]}
    first = widened(engine, TASKS, "", tokens)
    assert (first.signature.mode, first.extra[0].tolist(), first.cache) == (virtual.START, [2, 0], None)
    made = {"encoder_outputs": (torch.zeros(2, 7, 8),), "decoder_input_ids": IDS, "task_ids": [2, 0]}
    later = widened(engine, TASKS, "", made | {"attention_mask": MASK})
    assert (later.signature.mode, later.extra) == (virtual.START, ())
    assert "position_ids" not in given(later)


def test_labels_are_told_by_types_where_a_method_has_labels():
    arguments = {"input_ids": IDS, "labels": IDS + 10, "input_type_mask": torch.tensor([[1, 2, 3, 4], [4, 3, 4, 0]])}
    call = widened(Runner(), ours(front("prompt", labels=algebra.Param("I"))), "", arguments)
    assert given(call)["labels"].tolist() == [[-100, -100, -100, 16], [13, -100, 15, -100]]
    assert "input_type_mask" not in given(call)


def test_learned_positions():
    model = nn.Module()
    model.embeddings = nn.Module()
    model.embeddings.word_embeddings = nn.Embedding(40, 4)
    assert positions_of(model) is None
    model.embeddings.position_embeddings = nn.Embedding(16, 4)
    assert positions_of(model) == 16
    model.embeddings.position_embeddings = nn.Embedding(16, 4, padding_idx=1)
    assert positions_of(model) == 14, "counted from behind the padding's"
