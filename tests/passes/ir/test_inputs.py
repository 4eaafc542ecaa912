"""What inputs mean, kept at the placeholders of a graph."""

import pytest
from torch import fx

from peftc.passes.ir.inputs import (
    BATCH,
    PAST,
    SEQUENCE,
    CacheSlot,
    InputSpec,
    describe,
    inputs_of,
    own_cache,
    sizes_by,
    spec_of,
    with_role,
)
from peftc.passes.ir.roles import Role, Stack

SPECS = (
    InputSpec("ids", Role.TOKENS, Stack.ENCODER, ((BATCH,), (SEQUENCE,))),
    InputSpec("decoded", Role.TOKENS, Stack.DECODER, ((BATCH,), (SEQUENCE,))),
    InputSpec("past_0_key", Role.CACHE, Stack.DECODER, ((BATCH,), 2, (PAST,), 4), CacheSlot(0, "key")),
    InputSpec("past_cross_0_key", Role.CACHE, Stack.DECODER, ((BATCH,), 2, None, 4), CacheSlot(0, "key", cross=True)),
)


@pytest.fixture
def graph():
    graph = fx.Graph()
    for spec in SPECS:
        describe(graph.placeholder(spec.name), spec)
    graph.placeholder("unknown")
    graph.output(())
    return graph


def names(nodes):
    return [str(node.target) for node in nodes]


def test_every_input_says_what_it_is(graph):
    assert tuple(inputs_of(graph).values()) == (*SPECS, InputSpec("unknown"))
    assert spec_of(list(graph.nodes)[4]).role == Role.OTHER


def test_inputs_by_role_and_stack(graph):
    assert names(with_role(graph, Role.TOKENS)) == ["ids", "decoded"]
    assert names(with_role(graph, Role.TOKENS, Stack.DECODER, Stack.ONLY)) == ["decoded"]
    assert names(with_role(graph, Role.MASK)) == []
    assert names(own_cache(graph)) == ["past_0_key"], "what is over an encoder's output is not the text's own"


def test_a_copy_of_a_graph_keeps_them(graph):
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    assert tuple(inputs_of(copied).values()) == tuple(inputs_of(graph).values())


def test_sizes_that_inputs_are_bound_to():
    assert SPECS[2].bound == (None, 2, None, 4)
    assert SPECS[3].bound == (None, 2, None, 4)
    assert str(SPECS[3].slot) == "cross_0_key"


def test_sizes_where_dimensions_are_known():
    assert sizes_by({PAST: 7, SEQUENCE: 5}, (PAST, SEQUENCE, 1)) == 13
    assert sizes_by({}, 4) == 4
