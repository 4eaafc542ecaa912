"""The classifier against its formula written out."""

import pytest
import torch
from torch.testing import assert_close

from peftc.runtime.routing.classifier import ClassifierSettings, ScalingClassifier

HIDDEN = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def made(**settings):
    torch.manual_seed(1)
    return ScalingClassifier(ClassifierSettings(hidden_size=6, **settings), adapters=3, places=4).eval()


def test_one_layer():
    classifier = made(temperature=0.5, weight=2.0)
    (layer,) = classifier.layers
    logits = HIDDEN @ layer.weight.T + layer.bias
    shares = (logits / 0.5).exp() / (logits / 0.5).exp().sum(-1, keepdim=True)
    assert_close(classifier(HIDDEN), 2.0 * shares)
    latest = classifier.get_latest_scalings()
    assert latest.shape == (2, 5, 4, 3)
    assert_close(latest[:, :, 3], shares)


def test_several_layers_by_place():
    classifier = made(depth=3, size=8, by_place=True, softmax=False)
    assert [type(each).__name__ for each in classifier.layers] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    first, second, last = (classifier.layers[place] for place in (0, 3, 6))
    expected = last(torch.relu(second(torch.relu(first(HIDDEN))))).reshape(2, 5, 4, 3)
    assert_close(classifier(HIDDEN), expected)
    assert_close(classifier.get_latest_scalings(), expected)
    assert len(made(depth=2, size=8, dropout=0.0).layers) == 3


@pytest.mark.parametrize("again", [False, True])
def test_the_largest(again):
    classifier = made(top_k=2, softmax=False, softmax_top_k=again)
    found, logits = classifier(HIDDEN), classifier.layers(HIDDEN)
    smallest = logits.argmin(-1, keepdim=True)
    assert torch.equal(found == 0, torch.zeros_like(found, dtype=torch.bool).scatter(-1, smallest, True))
    left = logits.masked_fill(found == 0, float("-inf"))
    assert_close(found, left.softmax(-1) if again else logits * (found != 0))
    classifier.set_top_k(None)
    assert (classifier(HIDDEN) != 0).all()


def test_the_first_pass():
    classifier = made(weight=3.0)
    assert classifier.first_pass(2) is None
    classifier.set_scaling_pass_value(0.25)
    assert_close(classifier.first_pass(2), torch.full((2, 3), 0.75))
    classifier.set_scaling_pass_value(None)
    assert_close(classifier.first_pass(1), torch.ones(1, 3))


def test_the_log():
    classifier = made()
    classifier(HIDDEN)
    assert classifier.get_scalings_log() == []
    classifier.enable_scalings_logging()
    for each in (HIDDEN, HIDDEN[:, :2], HIDDEN):
        classifier(each)
    classifier.disable_scalings_logging()
    classifier(HIDDEN)
    log = classifier.get_scalings_log()
    assert [each.shape[1] for each in log] == [5, 2, 5]
    found = classifier.get_bucketed_scalings_log()
    assert {length: places for length, (places, _) in found.items()} == {5: [0, 2], 2: [1]}
    assert found[2][1][0] is log[1]
    classifier.clear_scalings_log()
    assert (classifier.get_scalings_log(), len(log)) == ([], 3)
    classifier.set_global_scaling_weight(0.5)
    assert classifier.get_global_scaling_weight() == 0.5
    assert_close(classifier(HIDDEN).sum(-1), torch.full((2, 5), 0.5))
