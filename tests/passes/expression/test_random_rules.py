"""apply(W', x) + b' = linear(x, W', b') for any rule that type-checks, with gradients; one adapter or two in a row."""

import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close

from peftc.grammar.algebra.algebra import without_bias
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.expression.scene import Eager
from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import fake_like
from peftc.passes.optimize.clean import Clean
from peftc.passes.plan.plan import PlannedSite
from peftc.passes.plan.resolve import resolve, survey
from peftc.passes.plan.structure import site_slot, structure_of, weighted

# A helper beside the tests, which are not a package.
_spec = importlib.util.spec_from_file_location("random_rules", Path(__file__).with_name("random_rules.py"))
assert _spec is not None
assert _spec.loader is not None
random_rules = importlib.util.module_from_spec(_spec)
sys.modules["random_rules"] = random_rules
_spec.loader.exec_module(random_rules)

SHAPES = ((4, 6), (6, 4), (6, 6), (3, 5), (1, 2))


class Plain(nn.Module):
    """One linear."""

    def __init__(self, out: int, columns: int, bias: bool):
        super().__init__()
        self.one = nn.Linear(columns, out, bias=bias, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


@functools.cache
def traced(lab, out, columns, bias):
    """A plain module, its trace, and what can be adapted there; made once."""
    with torch.random.fork_rng():
        torch.manual_seed(out * 10 + columns)
        model = Plain(out, columns, bias).requires_grad_(False)
    return model, lab.trace(model, torch.zeros(2, 3, columns, dtype=torch.float64)), survey(model)


@dataclass(frozen=True)
class Adapter:
    """A rule at the one site, with tensors of its own."""

    planned: PlannedSite
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, float]

    def primes(self, weight, bias):
        """W' and b' by definition."""
        zero = weight.new_zeros(len(weight))
        values = Evaluator(
            Eager(), self.tensors, self.scalars, weight=lambda: weight, bias=zero if bias is None else bias
        )
        bound = self.planned.bound
        matrix, _ = weighted(bound.weight, bound.bias)
        if bound.bias is None or (bias is None and without_bias(bound.bias) is None):
            return values.of(matrix), bias
        return values.of(matrix), values.of(bound.bias)


def adapter(text, ground, seed):
    spec = read_spec(f"{text} adapter a = m {{ on one }}").adapters[0]
    try:
        plan = resolve(spec, ground)
    except SpecError as error:
        if {each.code for each in error.diagnostics} != {"E217"}:
            raise
        reject()  # a function of a bias, where the module has none
    (planned,) = plan.sites
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for each in planned.bound.params:
        if each.trained:
            made = torch.randn(each.shape, generator=generator, dtype=torch.float64)
            tensors[each.role] = made.requires_grad_()
        else:
            limit = int(dict(each.init.arguments)["limit"])
            tensors[each.role] = torch.randperm(limit, generator=generator)[: each.shape[0]]
    scalars = dict(planned.bound.scalars)
    carrier = weighted(planned.bound.weight, planned.bound.bias)[1]
    if carrier is not None:
        scalars[carrier] = -1.5 * scalars.get(carrier, 1.0)
    return plan, Adapter(planned, tensors, scalars)


def compare(lab, texts, out, columns, bias, dense=False):
    """Outputs and the gradients of everything they depend on."""
    model, trace, ground = traced(lab, out, columns, bias)
    plans, adapters = zip(*(adapter(text, ground, seed) for seed, text in enumerate(texts)), strict=True)
    kinds = [{("one", role): each.dtype for role, each in made.tensors.items()} for made in adapters]
    paths = dict(model.named_parameters())
    for position, each in enumerate(adapters):
        slot = site_slot(position, "one")
        paths |= {f"{slot}.{role}": tensor for role, tensor in each.tensors.items()}
        paths |= {f"{slot}.{name}": torch.tensor(value, dtype=torch.float64) for name, value in each.scalars.items()}

    def slot_value(position, site, role, near):
        tensor = paths[f"{site_slot(position, site)}.{role}"]
        return fake_like(tensor.shape, tensor.dtype, near)

    graph = lab.copy(trace)
    sites = frozenset({"one"} if dense else ())
    insert = InsertDelta(structure_of(list(zip(plans, kinds, strict=True))), slot_value, False, sites)
    pass_manager.run(graph, [Clean(), insert])
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    weight, own_bias = model.one.weight, model.one.bias
    for each in adapters:
        weight, own_bias = each.primes(weight, own_bias)
    wanted = [x, *(tensor for each in adapters for tensor in each.tensors.values() if tensor.is_floating_point())]
    ours, theirs = lab.run(graph, paths, x), linear(x, weight, own_bias)
    assert_close(ours, theirs)
    for mine, reference in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert_close(mine, reference)


def gradients(result, wanted):
    if not result.requires_grad:
        return [torch.zeros_like(each) for each in wanted]
    weights = torch.arange(1.0, result.numel() + 1, dtype=torch.float64).reshape(result.shape)
    found = torch.autograd.grad((result * weights).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(each) if got is None else got for each, got in zip(wanted, found, strict=True)]


@st.composite
def cases(draw, most):
    out, columns = draw(st.sampled_from(SHAPES))
    count = draw(st.integers(1, most))
    return [draw(random_rules.methods(out, columns)) for _ in range(count)], out, columns


LAW = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@given(case=cases(1), bias=st.booleans(), dense=st.booleans())
@LAW
def test_one_rule(lab_of_all, case, bias, dense):
    compare(lab_of_all, *case, bias, dense)


@given(case=cases(2), bias=st.booleans())
@settings(LAW, max_examples=60)
def test_rules_in_a_row(lab_of_all, case, bias):
    compare(lab_of_all, *case, bias)
