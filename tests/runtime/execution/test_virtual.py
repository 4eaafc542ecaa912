"""Calls of a model with virtual tokens: what is checked, what is added, and what is kept beside a cache."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from peftc.compiler.api import adapt
from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import UsageError
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import Term, VirtualTokens
from peftc.runtime.adapted.adapted_module import EntryPoint
from peftc.runtime.execution import virtual
from peftc.runtime.execution.call import read_call
from peftc.runtime.execution.virtual import Virtual

IDS = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


def front(kind="prompt", tasks=0, compatible=False, length=3):
    site = Site("embed", "weight", kind, 8, 9)
    return VirtualTokens(site, Term(0, algebra.Param("P"), (), ()), length, tasks, compatible)


def call(**arguments):
    return read_call("", False, SimpleNamespace(use_cache=True), arguments)


def given(call):
    return dict(zip(call.signature.tensor_names, call.tensors, strict=True))


def refusal(code, run, *args):
    with pytest.raises(UsageError) as refused:
        run(*args)
    (found,) = refused.value.diagnostics
    assert found.code == code
    return found.message


def test_what_is_put_in_front():
    ours = Virtual((front(), front("cache"), front(tasks=5), front(tasks=3, compatible=True)))
    assert ours.of("prompt") == (ours.fronts[0], *ours.fronts[2:])
    assert ours.of("cache") == (ours.fronts[1],)
    assert (ours.tasks, ours.compatible) == (3, True)
    assert (Virtual().tasks, Virtual().compatible, Virtual().of("prompt")) == (0, False, ())


@pytest.mark.parametrize("value", [torch.tensor([2, 0]), [2, 0], torch.tensor([2, 0], dtype=torch.uint8)])
def test_tasks(value):
    assert virtual.tasks_of(value, 3).tolist() == [2, 0]


def test_no_tasks():
    assert virtual.tasks_of(None, 0) is None
    assert virtual.tasks_of(torch.zeros(0, dtype=torch.int64), 3).tolist() == [], "of a call without rows"


@pytest.mark.parametrize(
    ("value", "count", "says"),
    [
        ([0], 0, "no active adapter has tasks"),
        (None, 3, "the active adapter has tasks"),
        ("news", 3, "a task is a whole number for each row, not 'news'"),
        (1, 3, "not a tensor torch.int64 of shape []"),
        ([[1]], 3, "not a tensor torch.int64 of shape [1, 1]"),
        ([0.5], 3, "not a tensor torch.float32 of shape [1]"),
        ([True], 3, "not a tensor torch.bool of shape [1]"),
        ([0, 3], 3, "tasks are numbered from 0 to 2, and one is not"),
        ([-1], 3, "tasks are numbered from 0 to 2, and one is not"),
    ],
)
def test_tasks_that_are_refused(value, count, says):
    assert says in refusal("E563", virtual.tasks_of, value, count)


def test_labels_that_types_leave_out():
    labels, types = torch.arange(8)[None] + 10, torch.tensor([[0, 1, 2, 3, 4, 5, 8, -4]])
    found = virtual.labelled({"labels": labels, "input_type_mask": types, "x": 1})
    assert found["labels"].tolist() == [[-100, -100, -100, -100, 14, -100, 16, -100]]
    assert set(found) == {"labels", "x"}
    assert labels[0, 0] == 10, "the caller's are as they were"
    assert virtual.labelled({"input_type_mask": types}) == {}
    assert virtual.labelled({"labels": labels})["labels"] is labels
    message = refusal("E567", virtual.labelled, {"labels": labels, "input_type_mask": types[:, 1:]})
    assert message == "the types are of shape [1, 7], and the labels of shape [1, 8]"


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_an_empty_cache_is_given(encoder_decoder):
    plain, kind = call(input_ids=IDS), EncoderDecoderCache if encoder_decoder else DynamicCache
    found = virtual.with_empty_cache(plain, "cache", encoder_decoder)
    assert isinstance(found.cache, kind)
    assert found.cache.get_seq_length() == 0
    asked = call(input_ids=IDS, cache=found.cache)
    assert found.signature == asked.signature, "one graph serves both"
    assert found.keeps_cache
    assert not virtual.with_empty_cache(call(input_ids=IDS, use_cache=False), "cache", encoder_decoder).keeps_cache
    assert plain.cache is None


def test_positions_begin_at_the_text():
    found = virtual.with_positions(call(input_ids=IDS, attention_mask=MASK))
    assert given(found)["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    asked = call(input_ids=IDS, attention_mask=MASK, position_ids=given(found)["position_ids"])
    assert found.signature == asked.signature
    last = virtual.with_positions(call(input_ids=IDS[:, -1:], attention_mask=MASK))
    assert given(last)["position_ids"].tolist() == [[1], [3]], "of the tokens of this call"
    embedded = virtual.with_positions(call(inputs_embeds=torch.zeros(2, 4, 8), attention_mask=MASK))
    assert torch.equal(given(embedded)["position_ids"], given(found)["position_ids"])


def test_padding_elsewhere_moves_nothing():
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]])
    found = virtual.with_positions(call(input_ids=IDS, attention_mask=mask))
    assert given(found)["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": IDS},
        {"input_ids": IDS, "attention_mask": MASK, "position_ids": IDS},
        {"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 4, 4)},
        {"attention_mask": MASK},
    ],
)
def test_positions_are_given_only_where_a_mask_tells_them(arguments):
    plain = call(**arguments)
    assert virtual.with_positions(plain) is plain


def test_extra_tensors():
    plain, extra = call(input_ids=IDS), [torch.zeros(2)]
    found = virtual.with_extra(plain, virtual.CARRY, extra, "us")
    assert (found.signature.mode, found.extra, found.owner) == ("carry", tuple(extra), "us")
    assert found.signature != plain.signature
    assert found.tensors is plain.tensors


def test_what_is_kept_beside_a_cache():
    cache, left = DynamicCache(), (torch.arange(2.0)[:, None], torch.arange(2.0)[:, None] + 5)
    assert virtual.carried_by(cache, "us", 2) is None, "it began without virtual tokens"
    virtual.carry(cache, "us", list(left))
    assert virtual.carried_by(cache, "them", 2) is None
    assert virtual.carried_by(cache, "us", 2) == left
    assert [each[:, 0].tolist() for each in virtual.carried_by(cache, "us", 4)] == [[0, 0, 1, 1], [5, 5, 6, 6]]
    assert virtual.carried_by(cache, "us", 3) is None, "nobody knows whose rows these are"
    one = (torch.zeros(1, 3),)
    virtual.carry(cache, "us", one)
    assert virtual.carried_by(cache, "us", 7) == one, "of one row, it is every row's"


def test_a_call_of_one_token():
    assert virtual.first_token({"input_ids": IDS, "attention_mask": MASK})["input_ids"].tolist() == [[0], [3]]
    embedded = virtual.first_token({"inputs_embeds": torch.ones(2, 4, 8), "labels": IDS})
    assert {name: getattr(each, "shape", each) for name, each in embedded.items()} == {
        "inputs_embeds": (2, 1, 8),
        "use_cache": True,
    }


def test_arguments_that_no_model_takes(tiny):
    """They are adapters', and every other name is the mistake it was."""
    adapted = adapt(tiny.llama())
    adapted._validate_model_kwargs({"task_ids": [0]})
    with pytest.raises(ValueError, match="task_idz"):
        adapted._validate_model_kwargs({"task_ids": [0], "task_idz": [0]})
    assert adapted._named((IDS,), {"task_ids": [0]}) == {"input_ids": IDS, "task_ids": [0]}
    assert refusal("E563", lambda: adapted(IDS, task_ids=[0])) == "no active adapter has tasks"
    plain = adapt(Plain())
    assert plain._named((), {"x": IDS, "task_ids": [0]}) == {"x": IDS, "task_ids": [0]}
    with pytest.raises(TypeError, match=r"Plain\.forward has no argument 'task_idz'"):
        plain._named((IDS,), {"task_idz": [0]})


def test_arguments_of_an_entry_point():
    """A submodule's own signature knows of no adapters."""
    runs = []
    state = SimpleNamespace(run_whole=lambda path, arguments: runs.append((path, arguments)))
    model = SimpleNamespace(_adapter_state=state)
    encoder = EntryPoint(model, "encoder", nn.Linear(2, 2))
    encoder("x", task_ids=[1])
    assert runs == [("encoder", {"input": "x", "task_ids": [1]})]
    with pytest.raises(TypeError, match="task_idz"):
        encoder("x", task_idz=[1])
