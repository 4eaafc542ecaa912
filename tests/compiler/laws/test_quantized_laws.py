"""Every method that can sit on a linear, where its weight is stored packed: as on the dense weights that unpack."""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.grammar.spec.library import builtin_methods
from peftc.passes.optimize.hoist import KEPT_SHARE
from peftc.passes.quantized.schemes.known import Packed, packed
from peftc.runtime.adapters.bank import AdapterParameters
from tests.compiler.laws.test_method_laws import IN, OUT, Net, distinct, inputs, move
from tests.matrix import wide
from tests.parity.cases.case import Case

WHOLE = OUT * IN
BIASES = ("with bias", "without bias")

# What these keep by their own definition is as large as the weight, whatever it is stored as.
LARGE = {"frod": ["U"], "randlora": ["B"]}


def linear_cases() -> list[Case]:
    methods = builtin_methods()
    return [each for each in distinct() if "linear" in methods[each.method].kinds]


def eight_bit(linear: nn.Linear) -> nn.Module:
    """A linear of bitsandbytes with these weights, rounded to 8 bits."""
    made = bnb.nn.Linear8bitLt(IN, OUT, linear.bias is not None, has_fp16_weights=False, threshold=6.0)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def four_bit(linear: nn.Linear) -> nn.Module:
    """A linear of bitsandbytes with these weights, rounded to nf4, their scales to 8 bits."""
    made = bnb.nn.Linear4bit(IN, OUT, linear.bias is not None, compress_statistics=True, quant_type="nf4")
    made.load_state_dict(linear.state_dict())
    made.support_avx512bf16_for_cpu = False  # or it would repack itself when it is called
    return made.to("cpu")


class Bases:
    """A model that stores one weight packed, one that holds the values of it, and an adapted model of each."""

    def __init__(self, quantized: Callable[[nn.Linear], nn.Module], bias: bool):
        torch.manual_seed(0)
        self.model = Net(quantized(nn.Linear(IN, OUT, bias))).eval()
        dense = nn.Linear(IN, OUT, bias)
        dense.weight = nn.Parameter(self.held.unpack())
        if bias:
            dense.bias = self.model.inner.bias  # type: ignore[assignment]
        self.dense = Net(dense).eval()
        self.dense.words = self.model.words
        self.ours, self.wanted = adapt(self.model), adapt(self.dense)

    @property
    def held(self) -> Packed:
        """The packed weight."""
        found = packed(self.model.inner)
        assert found is not None
        return found

    @property
    def both(self) -> tuple[compiler.AdaptedModel, compiler.AdaptedModel]:
        """On packed and on dense weights."""
        return self.ours, self.wanted

    def add(self, case: Case) -> list[AdapterParameters]:
        """The same adapter on both."""
        for each in self.both:
            torch.manual_seed(1)
            each.add_adapter(f"adapter a = {case.method}({case.arguments}) {{ on inner }}", calibration=[inputs()])
        return [each._adapter_state.adapter("a") for each in self.both]

    def restore(self) -> None:
        """Take every adapter away."""
        for each in self.both:
            if each._adapter_state.displaced:
                each.unmerge_adapter()
            each.delete_adapter(each._adapter_state.names())
            each.eval()


@functools.cache
def made(bias: str) -> Bases:
    return Bases(four_bit, bias == BIASES[0])


@pytest.fixture
def bases(bias: str) -> Iterator[Bases]:
    found = made(bias)
    yield found
    found.restore()


@pytest.mark.parametrize("case", linear_cases(), ids=lambda each: each.method)
@pytest.mark.parametrize("bias", wide(BIASES, BIASES[:1]))
def test_laws(case: Case, bias: str, bases: Bases) -> None:
    ours, wanted = bases.both
    adapters = bases.add(case)
    for (key, mine), (_, its) in zip(*(each.items() for each in adapters), strict=True):
        assert torch.equal(mine, its), f"{key} starts from the values that unpack"
    with torch.no_grad():
        plain = bases.model(**inputs())
        if case.starts_as_base:
            assert (ours(**inputs()) - plain).abs().max() <= case.start_tolerance, "a start is the base"
    for each in adapters:
        move(each)

    outputs = [each(**inputs()) for each in bases.both]
    size = max(1.0, float(outputs[1].detach().abs().max()))
    assert_close(*outputs, rtol=0, atol=1e-5 * size)
    assert (outputs[0] - plain).abs().max() > 1e-4, "the adapter does something"
    found = [
        torch.autograd.grad(output.square().sum(), [*filter(is_trained, adapter.parameters())], allow_unused=True)
        for output, adapter in zip(outputs, adapters, strict=True)
    ]
    for mine, its in zip(*found, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            assert_close(mine, its, rtol=1e-3, atol=1e-4 * max(1.0, float(its.abs().max())))
    assert any(each is not None and each.abs().max() > 0 for each in found[0])

    for each in bases.both:
        each.set_adapter("a", inference_mode=True)
    with torch.no_grad():
        frozen = ours(**inputs())
        assert_close(frozen, outputs[0].detach(), rtol=0, atol=1e-5 * size)
        keeps_nothing_large(ours, adapters[0])
        before = [each.clone() for each in bases.held.parts]
        ours.merge_adapter(safe_merge=True, quantized="dequantize")
        wanted.merge_adapter(safe_merge=True)
        assert type(ours.inner) is nn.Linear
        for mine, its in zip(ours.inner.parameters(), wanted.inner.parameters(), strict=True):
            assert_close(mine, its, rtol=0, atol=1e-6 * max(1.0, float(its.abs().max())))
        assert_close(ours(**inputs()), frozen, rtol=0, atol=1e-5 * size)
        ours.unmerge_adapter()
        assert torch.equal(ours(**inputs()), frozen), "unmerging restores"
    assert all(map(torch.equal, bases.held.parts, before))


def is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def keeps_nothing_large(adapted: Any, adapter: AdapterParameters) -> None:
    """At rest nothing is as large as the weight: not what the adapter has, what is stored, what calls kept."""
    large = {key.role: tensor for key, tensor in adapter.items() if tensor.numel() >= WHOLE}
    assert list(large) == LARGE.get(adapter.plan.spec.rule.name, [])
    engine = adapted._adapter_state.engine
    stored = [each for _, holder in engine.storage._modules.values() for each in holder.buffers()]
    assert stored
    assert all(each.numel() < WHOLE for each in stored)
    programs = [each for local in engine.active.regions.values() for each in local.bound.values()]
    assert programs
    for pieces in (each.code.pieces for each in programs if each.code.pieces is not None):
        assert all(each.numel() <= WHOLE // KEPT_SHARE for each in pieces.values.values())
        read = [each for each in pieces._seen if not any(each is own for own in large.values())]
        assert all(each.numel() < WHOLE for each in read)


class Saved:
    """What autograd saves for the backward pass, as long as it does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved(adapted: compiler.AdaptedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output of a call in training, and every tensor that is there for its gradient once it is made."""
    found: list[weakref.ref[Saved]] = []

    def pack(tensor: torch.Tensor) -> Saved:
        each = Saved(tensor)
        found.append(weakref.ref(each))
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each.tensor):
        output = adapted.train()(**inputs())
    alive = [each.tensor for ref in found if (each := ref()) is not None]
    nodes, queue = set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            alive += getattr(node, "parts", ())  # a packed linear's own way to keep what is frozen
            queue += [each for each, _ in node.next_functions]
    return output, alive


@pytest.mark.parametrize(
    ("method", "quantized"),
    [
        ("lora(rank = 2)", four_bit),
        ("lora(rank = 2)", eight_bit),
        ("dora(rank = 2)", four_bit),
        ("oft(block = 4)", four_bit),
        ("vera(rank = 4)", four_bit),
    ],
)
def test_training_saves_no_dense_weight(
    method: str, quantized: Callable[[nn.Linear], nn.Module], request: pytest.FixtureRequest
) -> None:
    """Below stands another adapter, so that a gradient goes through the linear too."""
    bases = made(BIASES[0]) if quantized is four_bit else eight_bit_bases()
    request.addfinalizer(bases.restore)
    large = []
    for each in bases.both:
        each.add_adapter("adapter below = lora(rank = 2) { on words }")
        each.add_adapter(f"adapter a = {method} {{ on inner }}")
        each.set_adapter(["below", "a"])
        for adapter in map(each._adapter_state.adapter, ("below", "a")):
            move(adapter)
        output, kept = saved(each)
        assert output.grad_fn is not None
        stored = {part.data_ptr() for part in bases.held.parts}
        assert (each is bases.ours) == any(tensor.data_ptr() in stored for tensor in kept)
        large.append([tensor for tensor in kept if tensor.is_floating_point() and tensor.numel() >= WHOLE])
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in each.parameters() if p.requires_grad)
        each.zero_grad()
    assert not large[0]
    assert large[1], "the dense model's backward reads its weight"


@functools.cache
def eight_bit_bases() -> Bases:
    return Bases(eight_bit, True)


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_calibration_runs_on_the_values_that_unpack(method: str) -> None:
    """A method that starts from its inputs sees those that the model's own compute type gives, below it too."""
    torch.manual_seed(0)
    below = bnb.nn.Linear4bit(IN, IN, quant_type="nf4").to("cpu")  # as it is by default: ready to repack itself
    packed_model = Net(nn.Sequential(below, nn.Tanh(), four_bit(nn.Linear(IN, OUT))))
    dense_model = Net(nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, OUT)))
    dense_model.words = packed_model.words
    for index in (0, 2):
        module, dense = packed_model.inner[index], dense_model.inner[index]
        held = packed(module)
        assert held is not None
        dense.weight, dense.bias = nn.Parameter(held.unpack()), module.bias
    found = []
    for model in (packed_model, dense_model):
        torch.manual_seed(1)
        adapted = compiler.apply(model.eval(), f"adapter a = {method}(rank = 4) {{ on 2 }}", calibration=[inputs()])
        found.append(dict(adapted._adapter_state.adapter("a").items()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
    assert any(tensor.abs().max() > 0 for tensor in found[0].values())
