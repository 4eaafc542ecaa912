"""Modules whose forward has no graph, and whose own weights are adapted: they run on the adapted weights."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler import ModelError
from peftc.runtime.regions.region import Split


class Experts(nn.Module):
    """Holds weights itself, its forward depends on data and writes on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 4))
        self.downs = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
        self.fc = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = self.fc(x @ self.up) @ self.downs[1]
        return hidden if x.sum() > 0 else -hidden


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Experts(), Experts()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.blocks:
            x = x + each(x)
        return x


SPEC = 'adapter a = lora(rank = 2, alpha = 2, init = "random") { on blocks[*].up on blocks[*].downs[1] on fc }'
NAMES = ("up", "downs.1", "fc.weight")


def weights_of(adapted: Any, base: Net, *names: str) -> dict[str, torch.Tensor]:
    """W + B A, written out: alpha is the rank."""
    found = {}
    for number in range(2):
        for name in names or NAMES:
            full = f"blocks.{number}.{name}"
            holder = adapted.adapter_bank.a.get_submodule(full.removesuffix(".weight").replace(".", "__"))
            found[full] = base.get_parameter(full).detach() + holder.B @ holder.A
    return found


@pytest.mark.parametrize("sign", [1, -1])
def test_python_runs_on_adapted_weights(sign: int) -> None:
    base, x = Net(), sign * torch.rand(3, 4)
    adapted = compiler.apply(base, SPEC)
    expected = torch.func.functional_call(base, weights_of(adapted, base), x)
    given = adapted(x)
    assert_close(given, expected)
    with pytest.raises(AssertionError):
        assert_close(given, base(x))
    trained = [each for each in adapted.parameters() if each.requires_grad]
    assert len(trained) == 12
    ours = torch.autograd.grad(given.square().sum(), trained)
    theirs = torch.autograd.grad(expected.square().sum(), trained)
    assert_close(ours, theirs)
    local = adapted._adapter_state.host.local("blocks.0")
    assert any(isinstance(each, Split) for each in local.programs.values())


def test_what_a_forward_writes_stays_and_what_it_holds_is_its_own() -> None:
    adapted = compiler.apply(Net(), SPEC)
    own = adapted.blocks[0]._parameters["up"]
    adapted(torch.rand(3, 4)), adapted(torch.rand(3, 4))
    assert [each.calls for each in adapted.blocks] == [2, 2]
    assert adapted.blocks[0]._parameters["up"] is own


def test_followed_through_its_life() -> None:
    base, x = Net(), torch.rand(3, 4)
    adapted = compiler.apply(base, SPEC).eval()
    with torch.no_grad():
        before = adapted(x)
        assert_close(copy.deepcopy(adapted)(x), before)
        adapted.merge_adapter()
        assert_close(adapted(x), before)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(x), before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(x), base(x))
        for each in adapted.adapter_bank.a.parameters():
            each.mul_(2)
        expected = torch.func.functional_call(base, weights_of(adapted, base), x)
        assert_close(adapted(x), expected)
        assert_close(adapted.double()(x.double()).float(), expected)


def test_autocast_does_not_round_the_weights() -> None:
    base, x = Net(), torch.rand(3, 4)
    adapted = compiler.apply(base, SPEC.replace(" on fc", "")).eval()
    with torch.no_grad():
        weights = weights_of(adapted, base, "up", "downs.1")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            given, expected = adapted(x), torch.func.functional_call(base, weights, x)
    assert_close(given, expected)


class Looked(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) if ids.sum() > 0 else super().forward(ids + 1)


def test_what_is_no_weight_is_refused() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = Looked(8, 4), nn.Linear(4, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    adapted = compiler.apply(Text(), "adapter a = lora(rank = 2) { on head tokens [1, 2] in embed }")
    with pytest.raises(ModelError, match=r"E465.*embed"):
        adapted(torch.tensor([[1, 2]]))


def test_an_attribute_that_hides_the_parameter_is_adapted_too() -> None:
    """FSDP sets what stands for a parameter as an attribute too, for the time of a call."""
    base, x = Net().eval(), torch.randn(3, 4)
    adapted = compiler.apply(base, SPEC).eval()
    wanted = torch.func.functional_call(base, weights_of(adapted, base), (x,))
    for each in adapted.blocks:
        vars(each)["up"] = each.up.detach()
    assert_close(adapted(x), wanted)
    assert not torch.allclose(wanted, base(x))
