import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from peftc.grammar.diagnostics import UsageError
from peftc.runtime.execution import nest

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Box:
    inside: object
    label: str = "box"


def tensors():
    return st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.long]),
    )


constants = st.one_of(st.booleans(), st.integers(), st.text(max_size=3), st.none(), st.sampled_from([torch.float16]))
keys = st.text("abc", min_size=1, max_size=3)
values = st.recursive(
    tensors() | constants,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Box, inner),
    ),
    max_leaves=8,
)


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return left is right
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(*each) for each in zip(left, right, strict=True))
    if isinstance(left, Box):
        return left.label == right.label and equal(left.inside, right.inside)
    return left == right


@given(value=values)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_apart_and_together(value):
    leaves = []
    form = nest.flatten(value, leaves, "x")
    hash(form)
    assert nest.count_tensors(form) == len(leaves)
    assert not nest.holds_cache(form)
    left = list(leaves)
    assert equal(nest.rebuild(form, left), value)
    assert left == []


def test_the_form_knows_type_and_dimensions_but_not_sizes():
    forms = [nest.flatten([torch.zeros(shape, dtype=dtype)], [], "x") for shape, dtype in KINDS]
    assert forms[0] == forms[1]
    assert forms[0] != forms[2]
    assert forms[0] != forms[3]


KINDS = [((2, 3), torch.float32), ((5, 1), torch.float32), ((2, 3), torch.float64), ((2,), torch.float32)]


def test_containers_of_the_same_things_differ():
    one = torch.zeros(1)
    kinds = [[one], (one,), {"a": one}, OrderedDict(a=one), Box(one), Pair(one, one)]
    assert len({nest.flatten(each, [], "x") for each in kinds}) == len(kinds)


def test_one_and_true_are_told_apart():
    """`1 == True` in Python, and so the forms would be: a model may ask `is True`."""
    assert nest.flatten(1, [], "x") != nest.flatten(True, [], "x")


def test_a_model_output():
    output = CausalLMOutputWithPast(logits=torch.ones(1, 2), hidden_states=(torch.zeros(1), torch.ones(1)))
    leaves = []
    form = nest.flatten(output, leaves, "the output")
    assert len(leaves) == 3
    rebuilt = nest.rebuild(form, leaves)
    assert type(rebuilt) is CausalLMOutputWithPast
    assert rebuilt.loss is None
    assert rebuilt.logits is output.logits
    assert_close(rebuilt.hidden_states, output.hidden_states)


@dataclasses.dataclass
class Sample(OrderedDict):
    """An output as diffusers has them: a mapping of its own fields."""

    sample: torch.Tensor | None = None
    other: torch.Tensor | None = None

    def __post_init__(self):
        self.update({name: value for name, value in vars(self).items() if value is not None})


def test_an_output_that_is_a_mapping_and_has_fields():
    output = Sample(torch.ones(2))
    leaves = []
    form = nest.flatten(output, leaves, "the output")
    rebuilt = nest.rebuild(form, leaves)
    assert type(rebuilt) is Sample
    assert rebuilt.sample is output.sample is rebuilt["sample"]
    assert rebuilt.other is None
    assert list(rebuilt) == ["sample"]


def test_a_cache_is_one_item():
    cache = DynamicCache()
    form = nest.flatten(CausalLMOutputWithPast(logits=torch.ones(1), past_key_values=cache), [], "the output")
    assert nest.holds_cache(form)
    assert nest.holds_cache(nest.flatten([{"a": (cache,)}], [], "x"))
    assert nest.count_tensors(form) == 1
    assert nest.rebuild(form, [torch.ones(1)], cache).past_key_values is cache


@pytest.mark.parametrize(
    ("value", "place", "kind"),
    [
        (object(), "x", "object"),
        ({"a": [1, {1, 2}]}, "x.a[1]", "set"),
        (Box(lambda: None), "x.inside", "function"),
        (Box, "x", "type"),
    ],
)
def test_refusals_say_where(value, place, kind):
    with pytest.raises(UsageError) as caught:
        nest.flatten(value, [], "x")
    (found,) = caught.value.diagnostics
    assert found.code == "E501"
    assert found.message == f"{place} is of type {kind}, which cannot enter or leave a traced graph"
