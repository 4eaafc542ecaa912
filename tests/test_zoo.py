"""Models of the zoo: their own each time, the same weights each time, and one structure for the traces to share."""

import pytest
import torch

from tests import zoo
from tests.shared_traces import structure_of


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_model_is_another_with_the_same_weights(name):
    first, second, other = zoo.make(name), zoo.make(name), zoo.make(name, seed=1)
    assert structure_of(first) == structure_of(second) is not None
    weights = [torch.cat([each.flatten() for each in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not {each.data_ptr() for each in first.parameters()} & {each.data_ptr() for each in second.parameters()}


def test_fields_are_the_configs():
    assert zoo.make("llama", num_hidden_layers=2).config.num_hidden_layers == 2
    assert structure_of(zoo.make("llama")) != structure_of(zoo.make("llama", tie_word_embeddings=True))
