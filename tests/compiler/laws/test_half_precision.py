"""Every built-in method on a base of float16 or bfloat16 does what it does in float32, to the digits there are."""

import copy
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.runtime.adapters.bank import AdapterParameters
from tests.compiler.laws.test_method_laws import SITES, Net, add, distinct, inputs, move, pairs
from tests.parity.cases.case import Case

HALVES = (torch.float16, torch.bfloat16)
DIGITS = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the output's size; gradients have twice that

# What chooses by the largest of some numbers chooses others among those that are the same in a half.
CHOOSING = ("vblora", "vblora_topk")

# Kept, an adapter is of the base's type or of the other half; else it is float32, as PEFT has it.
KEPT = {"float32": None, "kept": 0, "of the other half": 1}


@functools.cache
def nets(site: str, dtype: torch.dtype) -> tuple[compiler.AdaptedModel, nn.Module, compiler.AdaptedModel]:
    """A float32 model adapted, and one of a half that has the same numbers, plain and adapted."""
    torch.manual_seed(0)
    model = Net(SITES[site][1]()).eval()
    half = copy.deepcopy(model).to(dtype)
    model.load_state_dict(half.state_dict())
    return adapt(model), half, adapt(half)


@pytest.fixture
def pair(site: str, dtype: torch.dtype) -> Iterator[tuple[compiler.AdaptedModel, nn.Module, compiler.AdaptedModel]]:
    found = nets(site, dtype)
    yield found
    for each in (found[0], found[2]):
        if each._adapter_state.displaced:
            each.unmerge_adapter()
        each.delete_adapter(each._adapter_state.names())


def halved(
    exact: compiler.AdaptedModel, adapted: compiler.AdaptedModel, case: Case, site: str, kept: torch.dtype | None
) -> tuple[AdapterParameters, AdapterParameters]:
    """The same adapter in both, of float32, or of a half that it stays in."""
    first, second = add(exact, case, site), add(adapted, case, site)
    move(first)
    with torch.no_grad():
        for (key, own), (same, other) in zip(first.items(), second.items(), strict=True):
            assert key == same
            if kept is not None and own.is_floating_point():
                own.copy_(own.to(kept))
            other.copy_(own)
    if kept is not None:
        second.to(kept)
        adapted._adapter_state.refresh()
    return first, second


def near(found: torch.Tensor, wanted: torch.Tensor, share: float) -> None:
    assert (found.float() - wanted).abs().max() <= share * max(1.0, float(wanted.detach().abs().max()))


def cases() -> Iterator[object]:
    """Every method at a linear layer in every way; at other kinds of sites, which share what computes them, in one."""
    for case, site in pairs():
        every = itertools.product(HALVES, KEPT) if site == "linear" else [(torch.float16, "kept")]
        marks = () if site == "linear" else pytest.mark.matrix
        for dtype, kept in every:
            yield pytest.param(case, site, dtype, kept, marks=marks, id=f"{case.method}-{site}-{dtype}-{kept}")


@pytest.mark.parametrize(("case", "site", "dtype", "kept"), list(cases()))
def test_laws(
    case: Case,
    site: str,
    dtype: torch.dtype,
    kept: str,
    pair: tuple[compiler.AdaptedModel, nn.Module, compiler.AdaptedModel],
) -> None:
    exact, half, adapted = pair
    other = KEPT[kept]
    kind = None if other is None else HALVES[(HALVES.index(dtype) + other) % 2]
    first, second = halved(exact, adapted, case, site, kind)
    digits = max(DIGITS[dtype], DIGITS[kind or dtype])

    wanted, found = exact(**inputs()), adapted(**inputs())
    assert found.dtype == dtype
    near(found, wanted, digits)
    trained = [[each for each in own.parameters() if each.requires_grad] for own in (second, first)]
    its = torch.autograd.grad(wanted.square().sum(), trained[1], allow_unused=True)
    mine = torch.autograd.grad(found.float().square().sum(), trained[0], allow_unused=True)
    for lowered, value in zip(mine, its, strict=True):
        assert (lowered is None) == (value is None)
        assert lowered is None or torch.isfinite(lowered).all()
    size = max(float(each.abs().max()) for each in its if each is not None)
    if case.method not in CHOOSING:
        for lowered, value in zip(mine, its, strict=True):
            assert lowered is None or (lowered.float() - value).abs().max() <= 2 * digits * size

    with torch.no_grad():
        unmerged, before = adapted(**inputs()), {name: each.clone() for name, each in half.state_dict().items()}
        adapted.merge_adapter(safe_merge=True)
        near(adapted(**inputs()), wanted, digits)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(**inputs()), unmerged)
        assert all(torch.equal(each, before[name]) for name, each in half.state_dict().items())
        plain = adapted.merge_and_unload()
        assert {each.dtype for each in plain.parameters()} == {dtype}
        near(plain(**inputs()), wanted, digits)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("site", ["linear"])
@pytest.mark.parametrize("case", distinct(), ids=lambda each: each.method)
def test_autocast(
    case: Case,
    site: str,
    dtype: torch.dtype,
    pair: tuple[compiler.AdaptedModel, nn.Module, compiler.AdaptedModel],
) -> None:
    """Operators that autocast makes halves of feed those that torch has not in a half."""
    exact, _, _ = pair
    adapter = add(exact, case, site)
    move(adapter)
    wanted = exact(**inputs())
    with torch.autocast("cpu", dtype=dtype):
        found = exact(**inputs())
        near(found, wanted, DIGITS[dtype])
        found.float().square().sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in adapter.parameters() if each.grad is not None)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval().to(dtype)


FROM_PEFT = {
    "oft": lambda: peft.OFTConfig(target_modules=["0"], r=2, oft_block_size=0, use_cayley_neumann=False),
    "boft": lambda: peft.BOFTConfig(target_modules=["0"], boft_block_size=2),
    "psoft": lambda: peft.PsoftConfig(target_modules=["0"], r=2),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=["0"], n_frequency=8),
    "hra": lambda: peft.HRAConfig(target_modules=["0"], r=2),
    "road": lambda: peft.RoadConfig(target_modules=["0"], group_size=2, variant="road_4"),
    "delora": lambda: peft.DeloraConfig(target_modules=["0"], r=2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("method", FROM_PEFT)
def test_what_peft_saved(method: str, upcast: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(mlp(), FROM_PEFT[method]()).eval()
    with torch.no_grad():
        for each in theirs.parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each) * 0.1)
        theirs.to(dtype).save_pretrained(tmp_path)
        theirs.float()
        x = torch.randn(3, 8)
        wanted = theirs(x)
        adapted = compiler.load(mlp(dtype), tmp_path, autocast_adapter_dtype=upcast).eval()
        near(adapted(x.to(dtype)), wanted, DIGITS[dtype])
        near(adapted.to(dtype)(x.to(dtype)), wanted, DIGITS[dtype])
        near(adapted.merge_and_unload()(x.to(dtype)), wanted, DIGITS[dtype])
