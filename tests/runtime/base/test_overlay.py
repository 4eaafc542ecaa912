"""An overlay against a model in which the same things were really put in place of its own."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.runtime.base.overlay import BANK, Overlay, is_adapters
from peftc.runtime.base.replaced import put


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = Block()
        self.again = self.block  # one module at two places
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.again(self.block(self.embed(ids)))))


IDS = torch.tensor([0, 3, 6])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def seeded(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def everything(model):
    state = model.state_dict(keep_vars=True)
    return {
        "tensors": {name: (id(each), each.detach().clone()) for name, each in state.items()},
        "modules": {name: (id(each), each.training) for name, each in model.named_modules()},
    }


def is_as_before(model, before):
    after = everything(model)
    assert after["modules"] == before["modules"]
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1], value)


def linear():
    made = nn.Linear(4, 6)
    with torch.no_grad():
        made.weight.copy_(seeded(6, 4))
        made.bias.fill_(0.5)
    return made


CASES = {
    "a parameter": lambda: {"block.up.weight": nn.Parameter(seeded(6, 4))},
    "a tensor": lambda: {"block.up.weight": seeded(6, 4)},
    "a buffer": lambda: {"norm.running_mean": seeded(4)},
    "a bias that comes": lambda: {"block.down.bias": nn.Parameter(seeded(4))},
    "a bias that goes": lambda: {"head.bias": None},
    "a module": lambda: {"block.up": linear()},
    "a module and its bias": lambda: {"block.up": linear(), "block.up.bias": nn.Parameter(seeded(6))},
    "a tie for one": lambda: {"head.weight": nn.Parameter(seeded(7, 4))},
    "several": lambda: {"head.bias": None, "norm.weight": nn.Parameter(seeded(4)), "block.up.bias": seeded(6)},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_is_what_really_putting_them_there_gives(case, model):
    expected = copy.deepcopy(model)
    put(expected, CASES[case]())
    before = everything(model)
    overlay = Overlay(model, CASES[case]())
    assert torch.equal(overlay.module(IDS), expected(IDS))
    assert not torch.equal(overlay.module(IDS), model(IDS))
    tensors = dict(overlay.tensors())
    assert tensors.keys() == dict(Overlay(expected).tensors()).keys()
    for name, value in Overlay(expected).tensors():
        assert torch.equal(tensors[name], value), name
        assert torch.equal(overlay.value(name), value), name
    is_as_before(model, before)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_copy_is_kept_and_shares_the_storage(case, model):
    replaced = CASES[case]()
    before = everything(model)
    overlay = Overlay(model, replaced)
    copied = overlay.copy()
    assert type(copied) is Net
    assert torch.equal(copied(IDS), overlay.module(IDS))
    assert copied.again is copied.block
    held = {each.untyped_storage().data_ptr() for each in overlay.module.parameters()}
    held |= {each.data_ptr() for each in replaced.values() if type(each) is torch.Tensor}
    copied_storages = {name: each.untyped_storage().data_ptr() for name, each in copied.named_parameters()}
    own = [name for name, each in copied_storages.items() if each not in held]
    assert own == [name for name, each in replaced.items() if type(each) is torch.Tensor and name in copied_storages]
    assert not {id(each) for each in copied.modules()} & {id(each) for each in overlay.module.modules()}
    is_as_before(model, before)


def test_nothing_replaced_is_the_model_itself(model):
    assert Overlay(model).module is model


def test_modules_that_hold_nothing_replaced_are_the_model_s(model):
    view = Overlay(model, {"block.up.bias": None}).module
    assert view.norm is model.norm
    assert view.block is not model.block
    assert view.again is view.block
    assert view.block.down is model.block.down
    assert type(view.block) is Block


def test_a_replaced_module_has_the_mode_of_the_one_it_replaces(model):
    other = linear().train()
    assert not Overlay(model, {"block.up": other}).module.block.up.training
    assert other.training
    assert Overlay(model.train(), {"block.up": other}).module.block.up is other


def test_ties_of_what_is_replaced_with_what_is_not(model):
    copied = Overlay(model, {"head.weight": model.embed.weight}).copy()
    assert copied.head.weight is copied.embed.weight


def test_a_name_that_nothing_has(model):
    assert Overlay(model).value("head.nothing") is None
    assert Overlay(model).value("nothing.weight") is None
    assert Overlay(model).quantization() is None
    assert_close(dict(Overlay(model).identity()), model.state_dict())


def test_names_of_adapters():
    assert is_adapters(BANK)
    assert is_adapters(f"{BANK}.a.x")
    assert not is_adapters(f"{BANK}s.x")
