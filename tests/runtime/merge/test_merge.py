import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler

SPEC = "adapter a = lora(rank = 2, alpha = 4) { on all linear }"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def adapt(model, spec=SPEC):
    torch.manual_seed(0)
    adapted = compiler.apply(model.eval(), spec).eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return adapted


def sequence(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def test_merged_is_unmerged():
    adapted, x = adapt(sequence()), torch.randn(6, 4)
    before = adapted(x)
    adapted.merge_adapter()
    assert_close(adapted(x), before)
    a, b = adapted.adapter_bank.a.get_submodule("0").A, adapted.adapter_bank.a.get_submodule("0").B
    assert_close(adapted[0].weight, sequence()[0].weight + 2.0 * b @ a)
    with adapted.disable_adapter():
        assert_close(adapted(x), sequence()(x))
    assert_close(adapted(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_is_rounded_once(dtype):
    """The sum is made in the adapter's float32; rounding the delta first would give other bits."""
    adapted = adapt(sequence(dtype))
    bank = adapted.adapter_bank.a.get_submodule("0")
    assert bank.A.dtype == torch.float32
    base, delta = adapted[0].weight.detach().clone(), (bank.B @ bank.A).detach() * 2.0
    adapted.merge_adapter()
    assert torch.equal(adapted[0].weight, (base.float() + delta).to(dtype))
    assert not torch.equal(adapted[0].weight, base + delta.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_a_half_is_merged_in_float32(dtype):
    adapted = adapt(sequence(dtype)).to(dtype)
    bank = adapted.adapter_bank.a.get_submodule("0")
    assert bank.A.dtype == dtype
    base, delta = adapted[0].weight.detach().clone(), (bank.B.float() @ bank.A.float()).detach() * 2.0
    adapted.merge_adapter()
    assert torch.equal(adapted[0].weight, (base.float() + delta).to(dtype))
    assert not torch.equal(adapted[0].weight, base + (bank.B @ bank.A).detach() * 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_the_same_objects_back(dtype):
    model = sequence(dtype)
    adapted = adapt(model)
    before = {name: (each, each.clone()) for name, each in adapted.named_parameters()}
    for _ in range(3):
        adapted.merge_adapter()
        assert not torch.equal(adapted[0].weight, before["0.weight"][1])
        adapted.unmerge_adapter()
    for name, each in adapted.named_parameters():
        assert each is before[name][0]
        assert torch.equal(each, before[name][1])
    assert adapted[0].weight.data_ptr() == model[0].weight.data_ptr()


def test_the_users_weights_are_not_written():
    model = sequence()
    values = {name: each.clone() for name, each in model.state_dict().items()}
    adapted = adapt(model)
    adapted.merge_adapter()
    adapted.merge_and_unload()
    assert all(torch.equal(each, values[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize(("target", "other"), [("embed", "head"), ("head", "embed")])
def test_one_side_of_a_tie(target, other):
    model = Tied()
    adapted, ids = adapt(model, f"adapter a = lora(rank = 2) {{ on {target} }}"), torch.tensor([[1, 2], [3, 6]])[:, 0]
    before = adapted(ids)
    adapted.merge_adapter()
    assert adapted.get_submodule(other).weight.data_ptr() == model.embed.weight.data_ptr()
    assert not torch.equal(adapted.get_submodule(target).weight, model.embed.weight)
    assert_close(adapted(ids), before)
    plain = adapted.merge_and_unload()
    assert type(plain) is Tied
    assert_close(plain(ids), before)
    adapted.unmerge_adapter()
    assert adapted.head.weight is adapted.embed.weight


def test_copies_with_buffers():
    model = Tied()
    adapted = adapt(model, "adapter a = lora(rank = 2) { on head  train norm }")
    with torch.no_grad():
        adapted.adapter_bank.a.norm.running_mean.fill_(3.0)
    ids = torch.tensor([1, 3])
    before = adapted(ids)
    adapted.merge_adapter()
    assert torch.equal(adapted.norm.running_mean, torch.full((4,), 3.0))
    assert_close(adapted(ids), before)
    assert_close(adapted.merge_and_unload()(ids), before)
    adapted.unmerge_adapter()
    assert not adapted.norm.running_mean.any()
    assert not model.norm.running_mean.any()


def test_several_with_weights_and_a_subset():
    adapted = adapt(sequence(), SPEC + ' adapter b = lora(rank = 3, alpha = 3) { on "0" } activate a + 0.5 * b')
    x = torch.randn(6, 4)
    both = adapted(x)
    adapted.merge_adapter()
    assert_close(adapted(x), both)
    adapted.unmerge_adapter()
    plain = adapted.merge_and_unload(adapter_names=["b"])
    bank = adapted.adapter_bank.b.get_submodule("0")
    assert_close(plain[0].weight, adapted[0].weight + 0.5 * bank.B @ bank.A)
    assert torch.equal(plain[2].weight, adapted[2].weight)


def test_a_plain_model_is_left_as_it_was():
    model = sequence()
    model[0].bias.requires_grad_(False)
    plain = adapt(model).merge_and_unload()
    assert {name: each.requires_grad for name, each in plain.named_parameters()} == {
        name: each.requires_grad for name, each in model.named_parameters()
    }
    assert "adapter_bank" not in dict(plain.named_children())


def test_unload_while_merged_is_the_base():
    model, x = sequence(), torch.randn(6, 4)
    adapted = adapt(model)
    adapted.merge_adapter()
    assert_close(adapted.unload()(x), model(x))
    assert not torch.allclose(adapted(x), model(x))
