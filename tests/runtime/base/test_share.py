import threading

import pytest
import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError
from peftc.runtime.base.share import placement, share


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.embed.weight.requires_grad_(False)
        self.notes = {"seen": [1]}

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


@pytest.fixture
def pair():
    model = Tied()
    return model, share(model)


def test_storage_is_shared_and_objects_are_not(pair):
    model, copied = pair
    assert type(copied) is Tied
    for (name, one), (other, two) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert name == other
        assert one is not two
        assert one.data_ptr() == two.data_ptr()
    assert all(one is not two for one, two in zip(model.modules(), copied.modules(), strict=True))


def test_ties_are_kept(pair):
    _, copied = pair
    assert copied.head.weight is copied.embed.weight


def test_buffers_are_cloned(pair):
    model, copied = pair
    copied.train()(torch.tensor([0, 1, 2]))
    assert copied.norm.num_batches_tracked == 1
    assert model.norm.num_batches_tracked == 0
    assert not model.norm.running_mean.any()
    assert copied.norm.running_mean.any()


def test_what_is_no_tensor_is_copied(pair):
    model, copied = pair
    copied.notes["seen"].append(2)
    assert model.notes == {"seen": [1]}


def test_moving_and_replacing_leave_the_original_alone(pair):
    model, copied = pair
    copied.double()
    copied.norm.weight = None
    assert model.embed.weight.dtype == torch.float32
    assert model.norm.weight is not None


@pytest.mark.parametrize(("asked", "expected"), [(None, [False, True, True]), (False, [False] * 3), (True, [True] * 3)])
def test_requires_grad(asked, expected):
    model = Tied()
    before = [each.requires_grad for each in model.parameters()]
    assert [each.requires_grad for each in share(model, requires_grad=asked).parameters()] == expected
    assert [each.requires_grad for each in model.parameters()] == before


def test_gradients_do_not_meet():
    model = Tied().eval()
    copied = share(model)
    copied(torch.tensor([0, 1])).sum().backward()
    assert copied.norm.bias.grad is not None
    assert model.norm.bias.grad is None


def test_leave_out():
    model = Tied()
    copied = share(model, leave_out=("notes", "norm"))
    assert not hasattr(copied, "notes")
    assert "norm" not in dict(copied.named_children())
    assert "norm" in dict(model.named_children())


def test_a_replaced_forward_is_refused():
    model = Tied()
    model.forward = lambda ids: ids
    with pytest.raises(ModelError, match=r"E404.*the forward of this Tied object was replaced"):
        share(model)


def test_a_forward_that_is_the_classs_own_is_not_refused():
    """What transformers' exporter leaves behind on a model it traced."""
    model = Tied()
    model.forward = model.forward
    model.norm.forward = model.norm.forward
    copied = share(model)
    assert "forward" not in copied.__dict__
    assert "forward" not in copied.norm.__dict__


def test_what_cannot_be_copied_is_refused():
    model = Tied()
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"E401.*Tied cannot be copied") as caught:
        share(model)
    assert "a lock" in caught.value.diagnostics[0].help


def test_placement():
    assert placement(nn.Linear(1, 1).double()) == (torch.device("cpu"), torch.float64)
    assert placement(nn.ReLU()) == (None, None)
