"""Every built-in method at every kind of site: what its expression promises holds in the graph and in the weights."""

import functools
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.library import builtin_methods
from peftc.passes.expression.materialise import Evaluator, to_logical, to_stored, unstack
from peftc.passes.expression.scene import Eager
from peftc.runtime.adapters.bank import AdapterParameters
from tests.parity.cases import low_rank, other, rotations
from tests.parity.cases.case import Case

ROWS, IN, OUT, WORDS = 5, 32, 48, 64


class Own(nn.Module):
    """A weight that is no module's."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(OUT, IN) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.own)


class Experts(nn.Module):
    """A stack of three."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, OUT, IN) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nte,eoi,nti->nto", torch.softmax(x[..., :3], -1), self.experts, x)


class Shaped(nn.Module):
    """A convolution of rows that are given axes."""

    def __init__(self, conv: nn.Module, *axes: int) -> None:
        super().__init__()
        self.conv, self.axes = conv, axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2).reshape(-1, *self.axes)).flatten(2)


class Attending(nn.Module):
    """Looks at itself."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(IN, 2, batch_first=True, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    """Words, and what something makes of them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, IN)
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(self.words(ids)))


# What is adapted, in what, of which kind. Every weight but the packed one is 48 x 32.
SITES: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "linear": ("inner", lambda: nn.Linear(IN, OUT), "linear"),
    "linear without bias": ("inner", lambda: nn.Linear(IN, OUT, bias=False), "linear"),
    "conv1d": ("inner", lambda: Conv1D(OUT, IN), "conv1d"),
    "embedding": ("words", lambda: nn.Linear(IN, OUT), "embedding"),
    "convolution1d": ("conv", lambda: Shaped(nn.Conv1d(16, OUT, 2, padding=1), 16, 2 * ROWS), "convolution1d"),
    "conv2d": (
        "conv",
        lambda: Shaped(nn.Conv2d(16, OUT, 2, stride=2, padding=1, dilation=2, groups=2), 16, 2, ROWS),
        "conv2d",
    ),
    "conv3d": ("conv", lambda: Shaped(nn.Conv3d(8, OUT, (1, 2, 2), bias=False), 8, 2, 2, ROWS), "conv3d"),
    "multihead_attention": ("attn.in_proj_weight", Attending, "multihead_attention"),
    "attention without bias": ("attn.in_proj_weight", lambda: Attending(bias=False), "multihead_attention"),
    "parameter": ("own", Own, "parameter"),
    "stack": ("experts", Experts, "parameter"),
}


def inputs() -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, WORDS, (2, ROWS), generator=torch.Generator().manual_seed(1))}


def distinct() -> list[Case]:
    """One case for every method; that its variants compute what peft does is tested on models."""
    found: dict[str, Case] = {}
    for each in (*low_rank.CASES, *low_rank.UNSAVED, *rotations.CASES, *other.CASES):
        found.setdefault(each.method, each)
    return list(found.values())


# A method that is nothing but a bias, where a module cannot be given one.
REFUSED = {("beft", "attention without bias"): "E217"}


def pairs() -> Iterator[tuple[Case, str]]:
    methods = builtin_methods()
    for case in distinct():
        for site in SITES:
            if SITES[site][2] in methods[case.method].kinds and (case.method, site) not in REFUSED:
                yield case, site


every_pair = pytest.mark.parametrize(
    ("case", "site"), list(pairs()), ids=lambda each: each if isinstance(each, str) else each.method
)


@functools.cache
def net(site: str) -> tuple[nn.Module, compiler.AdaptedModel]:
    """A model, and an adapted model of it that every case puts its adapter into: one trace serves them all."""
    torch.manual_seed(0)
    model = Net(SITES[site][1]()).eval()
    return model, adapt(model)


@pytest.fixture
def nets(site: str) -> Iterator[tuple[nn.Module, compiler.AdaptedModel]]:
    model, adapted = net(site)
    yield model, adapted
    if adapted._adapter_state.displaced:
        adapted.unmerge_adapter()
    adapted.delete_adapter(adapted._adapter_state.names())


def add(adapted: compiler.AdaptedModel, case: Case, site: str, name: str = "a") -> AdapterParameters:
    given = case.arguments
    if SITES[site][2] == "parameter":
        given = re.sub(r",? *dropout = [0-9.]+", "", given)  # it has no input of its own
    spec = f"adapter {name} = {case.method}({given}) {{ on {SITES[site][0]} }}"
    adapted.add_adapter(spec, calibration=[inputs()])  # most methods need none
    return adapted._adapter_state.adapter(name)


@torch.no_grad()
def move(adapter: AdapterParameters, seed: int = 2, std: float = 0.2) -> None:
    torch.manual_seed(seed)
    for each in adapter.parameters():
        each.add_(torch.randn_like(each) * std)


def primes(adapter: AdapterParameters, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """W' and b' of an adapter's one site over a stored weight, with gradients: the expression's value and no more."""
    (at,), ops = adapter.plan.sites, Eager()
    params = {
        each.role: unstack(
            ops, adapter.tensor(at.key(adapter.plan.name, each)), each.stacked_axis, each.shared, at.site
        )
        for each in at.bound.params
    }
    logical = to_logical(ops, weight, at.site)
    values = Evaluator(ops, params, dict(at.bound.scalars), weight=lambda: logical, bias=bias, lead=at.site.lead)
    found = {at.site.weight: to_stored(ops, values.of(at.bound.weight), at.site)}
    new_bias = at.bound.bias
    if new_bias is not None and bias is None:
        new_bias = algebra.without_bias(new_bias)
    if new_bias is not None:
        found[at.site.bias] = values.of(new_bias)
    return found


def tensor(model: nn.Module, name: str) -> torch.Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf, None)


def materialised(model: nn.Module, *adapters: AdapterParameters) -> torch.Tensor:
    """The model's output with every adapter's W' and b' in place of the weights, one after the other."""
    tensors: dict[str, torch.Tensor] = {}
    for each in adapters:
        site = each.plan.sites[0].site
        weight, bias = (tensors.get(name, tensor(model, name)) for name in (site.weight, site.bias))
        tensors |= primes(each, weight, bias)
    bias = [name for name in tensors if name.endswith(".bias") and tensor(model, name) is None]
    if bias:  # functional_call replaces what is there: a module without a bias gets one in its output
        axes = len(adapters[0].plan.sites[0].site.kernel)
        added = tensors.pop(bias[0]).reshape(-1, *(1,) * axes)
        handle = model.get_submodule(bias[0].rpartition(".")[0]).register_forward_hook(lambda *given: given[2] + added)
        try:
            return functional_call(model, tensors, (), inputs())
        finally:
            handle.remove()
    return functional_call(model, tensors, (), inputs())


@pytest.fixture
def op_by_op() -> Iterator[None]:
    """Without gradients torch has one kernel for a whole MultiheadAttention, which rounds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@every_pair
@pytest.mark.usefixtures("op_by_op")
def test_laws(case: Case, site: str, nets: tuple[nn.Module, compiler.AdaptedModel]) -> None:
    model, adapted = nets
    adapter = add(adapted, case, site)
    with torch.no_grad():
        with adapted.disable_adapter():
            plain = adapted(**inputs())
        assert_close(plain, model(**inputs()), rtol=0, atol=1e-5)
        if case.starts_as_base:
            found = adapted(**inputs())
            assert (found - plain).abs().max() <= case.start_tolerance, "a start is the base"
    move(adapter)

    trained = [each for each in adapter.parameters() if each.requires_grad]
    found, wanted = adapted(**inputs()), materialised(model, adapter)
    size = max(1.0, float(wanted.detach().abs().max()))
    assert_close(found, wanted, rtol=0, atol=1e-5 * size)
    assert (found - plain).abs().max() > 1e-4, "the adapter does something"
    mine = torch.autograd.grad(found.square().sum(), trained, allow_unused=True)
    its = torch.autograd.grad(wanted.square().sum(), trained, allow_unused=True)
    for lowered, value in zip(mine, its, strict=True):
        assert (lowered is None) == (value is None)
        if value is not None:
            assert_close(lowered, value, rtol=1e-3, atol=1e-4 * max(1.0, float(value.abs().max())))
    assert any(each is not None and each.abs().max() > 0 for each in mine)

    with torch.no_grad():
        unmerged = adapted(**inputs())
        before = {name: each.clone() for name, each in model.state_dict().items()}
        adapted.merge_adapter(safe_merge=True)
        assert_close(adapted(**inputs()), unmerged, rtol=0, atol=1e-5 * size)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(**inputs()), unmerged), "unmerging restores"
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@every_pair
def test_two_compose_in_order(case: Case, site: str, nets: tuple[nn.Module, compiler.AdaptedModel]) -> None:
    model, adapted = nets
    first, second = add(adapted, case, site), add(adapted, case, site, "b")
    move(first)
    move(second, seed=3)
    with torch.no_grad():
        adapted.set_adapter(["a", "b"])
        size = max(1.0, float(adapted(**inputs()).abs().max()))
        assert_close(adapted(**inputs()), materialised(model, first, second), rtol=0, atol=2e-5 * size)
        adapted.set_adapter(["b", "a"])
        assert_close(adapted(**inputs()), materialised(model, second, first), rtol=0, atol=2e-5 * size)


def test_every_formula_of_a_weight_has_a_case() -> None:
    formulas = {name for name, rule in builtin_methods().items() if rule.weight or rule.bias or rule.copies}
    # One needs a quantized base, test_loftq, one calls that say tasks: tests/parity/mixed/test_tasks.
    assert {case.method for case in distinct()} == formulas - {"loftq", "poly"}


@pytest.mark.parametrize(("method", "site"), REFUSED)
def test_refusals(method: str, site: str) -> None:
    (case,) = (each for each in distinct() if each.method == method)
    with pytest.raises(SpecError) as caught:
        add(net(site)[1], case, site)
    assert {each.code for each in caught.value.diagnostics} == {REFUSED[method, site]}
