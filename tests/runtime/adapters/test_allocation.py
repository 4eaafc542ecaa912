"""Budgets: the schedule, importance and masks worked out by hand, buffers that come and go with a state dict."""

import copy

import pytest
import torch

from peftc.grammar.diagnostics import SpecError, UsageError
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.check import check_method
from peftc.grammar.method.rule import Schedule, Value
from peftc.grammar.source import Source
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse
from peftc.passes.plan.plan import AdapterPlan, ParamKey, PlannedSite
from peftc.passes.plan.site import Site
from peftc.runtime.adapters.allocation import budget_at, expanded
from peftc.runtime.adapters.bank import ALLOCATOR, AdapterParameters, trained_keys

METHOD = """
method pruned(rank: int = 2, kept: int = 1, steps: int = 4, weight: float = 0, smooth: float = 0.5) {
    on       linear
    param    A[rank, in]  = normal saved "a"
    param    v[1, rank]   = zeros  saved "v"
    param    B[out, rank] = normal saved "b"
    W'       = W + (B * v) @ A
    allocate v with A, B {
        target = kept, steps = steps, final = 1, sensitivity = smooth, uncertainty = smooth, orthogonal = weight
    }
}
"""


def _adapter(*by_site: dict[str, Value]) -> AdapterParameters:
    """Adapted linears of 3 features into 2, every number drawn."""
    (method,) = parse(Source("m.adapter", METHOD)).statements
    assert isinstance(method, tree.Method)
    rule = check_method(method)
    planned, tensors = [], {}
    generator = torch.Generator().manual_seed(0)
    for index, values in enumerate(by_site or ({}, {})):
        site = Site(f"s{index}", "weight", "linear", 2, 3)
        given = tuple({**dict(complete(rule, ())), **values}.items())
        planned.append(PlannedSite(site, bind(rule, given, Place("linear", 2, 3))))
        for each in planned[-1].bound.params:
            tensors[ParamKey("a", site.name, each.role)] = torch.randn(each.shape, generator=generator)
    plan = AdapterPlan(AdapterSpec("a", rule, complete(rule, ())), tuple(planned))
    return AdapterParameters(plan, tensors, trained_keys(plan))


def _step(adapter: AdapterParameters, step: int, scale: float = 1.0) -> None:
    """A step whose gradients are drawn."""
    generator = torch.Generator().manual_seed(100 + step)
    for _, tensor in adapter.items():
        tensor.grad = torch.randn(tensor.shape, generator=generator) * scale
    assert adapter.allocator is not None
    adapter.allocator.update(adapter.tensor, step)


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (0, (20, False)),
        (2, (20, False)),
        (3, (16, False)),
        (4, (13, True)),
        (6, (9, True)),
        (9, (8, False)),
        (10, (8, True)),
        (99, (8, True)),
    ],
)
def test_the_schedule(step: int, found: tuple[int, bool]) -> None:
    schedule = Schedule(steps=12, warmup=2, final=2, every=2)
    assert budget_at(schedule, step, 20, 8) == found
    assert budget_at(schedule, step, 8, 8)[0] == 8


def test_masks_are_those_worked_out_by_hand() -> None:
    adapter = _adapter()
    size: dict[ParamKey, torch.Tensor] = {}
    change: dict[ParamKey, torch.Tensor] = {}
    before = {key: tensor.detach().clone() for key, tensor in adapter.items()}
    _step(adapter, 1)
    for key, tensor in adapter.items():
        assert tensor.grad is not None
        now = (before[key] * tensor.grad).abs()
        size[key] = 0.5 * now
        change[key] = 0.5 * (now - size[key]).abs()
    scores = {}
    for site in ("s0", "s1"):
        both = {role: size[ParamKey("a", site, role)] * change[ParamKey("a", site, role)] for role in "vAB"}
        scores[site] = both["v"][0] + both["A"].mean(1) + both["B"].mean(0)
    ranked = torch.cat(list(scores.values())).sort().values
    assert adapter.allocator is not None
    for key, mask in adapter.allocator.masks.items():
        # Two of four may go: int((4 - 2) * (2 / 3) ** 3 + 2) stay.
        assert torch.equal(mask, scores[key.site] > ranked[1])
        assert torch.equal(adapter.tensor(key)[0] != 0, mask)
    _step(adapter, 3)
    assert sum(int(mask.sum()) for mask in adapter.allocator.masks.values()) == 2
    assert not any(name.startswith("sens") for name, _ in adapter.allocator.named_buffers())


def test_the_last_masks_stay() -> None:
    adapter = _adapter()
    for step in range(4):
        _step(adapter, step)
    assert adapter.allocator is not None
    before = {key: mask.clone() for key, mask in adapter.allocator.masks.items()}
    with torch.no_grad():
        for key in before:
            adapter.tensor(key).fill_(1.0)
    _step(adapter, 4)
    for key, mask in adapter.allocator.masks.items():
        assert torch.equal(mask, before[key])
        assert torch.equal(adapter.tensor(key)[0] != 0, mask)


def test_nothing_is_dropped_where_all_may_stay() -> None:
    adapter = _adapter({"kept": 2}, {"kept": 2})
    for step in range(4):
        _step(adapter, step)
    assert adapter.allocator is not None
    assert all(mask.all() for mask in adapter.allocator.masks.values())


def test_targets_may_differ_and_schedules_not() -> None:
    adapter = _adapter({"kept": 2}, {"kept": 0})
    assert adapter.allocator is not None
    assert [each.target for each in adapter.allocator.groups] == [2, 0]
    with pytest.raises(SpecError, match=r"E219.*one schedule"):
        _adapter({"steps": 4}, {"steps": 5})


def test_an_overflow_does_not_spoil_the_averages() -> None:
    adapter = _adapter()
    _step(adapter, 0, scale=float("inf"))
    _step(adapter, 1)
    assert adapter.allocator is not None
    assert all(torch.isfinite(each).all() for each in adapter.allocator.buffers() if each.is_floating_point())
    assert 0 < sum(int(mask.sum()) for mask in adapter.allocator.masks.values()) < 4


def test_a_gradient_is_needed_and_a_number_of_steps() -> None:
    adapter, unsaid = _adapter(), _adapter({"steps": 0})
    assert adapter.allocator is not None
    with pytest.raises(UsageError, match=r"E548.*no gradient"):
        adapter.allocator.update(adapter.tensor, 0)
    with pytest.raises(UsageError, match=r"E547.*number of steps that was not said"):
        _step(unsaid, 0)


def test_the_penalty_is_the_distance_from_orthonormal() -> None:
    adapter = _adapter({"weight": 0.5}, {"weight": 0.5})
    terms = []
    for site in ("s0", "s1"):
        down, up = (adapter.tensor(ParamKey("a", site, role)) for role in "AB")
        terms += [(down @ down.T - torch.eye(2)).norm(), (up.T @ up - torch.eye(2)).norm()]
    penalty = adapter.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty, 0.5 * torch.stack(terms).mean())
    penalty.backward()
    assert adapter.tensor(ParamKey("a", "s0", "A")).grad is not None
    assert _adapter({"weight": 0.0}).penalty() is None


def test_what_a_file_left_out_has_no_part_in_the_penalty() -> None:
    adapter = _adapter({"weight": 1.0})
    with torch.no_grad():
        for role, axis in (("A", 0), ("B", 1), ("v", 1)):
            adapter.tensor(ParamKey("a", "s0", role)).movedim(axis, 0)[1] = 0
    assert adapter.allocator is not None
    adapter.allocator.restore({ParamKey("a", "s0", "v"): [True, False]}, adapter.tensor)
    down, up = adapter.tensor(ParamKey("a", "s0", "A"))[:1], adapter.tensor(ParamKey("a", "s0", "B"))[:, :1]
    wanted = ((down @ down.T - 1).norm() + (up.T @ up - 1).norm()) / 2
    penalty = adapter.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty, wanted)


def test_a_state_dict_brings_its_masks_and_measures() -> None:
    adapter, other = _adapter(), _adapter()
    before = copy.deepcopy(adapter.state_dict())
    assert not any(key.startswith(ALLOCATOR) for key in before)
    for step in range(2):
        _step(adapter, step)
    state = copy.deepcopy(adapter.state_dict())
    other.load_state_dict(state)
    for step in range(2, 4):
        _step(adapter, step)
        _step(other, step)
    assert adapter.allocator is not None
    assert other.allocator is not None
    assert adapter.allocator.masks.keys() == other.allocator.masks.keys() != set()
    for key, mask in adapter.allocator.masks.items():
        assert torch.equal(mask, other.allocator.masks[key])
    assert other.load_state_dict(before).missing_keys == []
    assert other.allocator.masks == {}


def test_a_pruned_tensor_at_its_full_size() -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert expanded(tensor, 0, [True, False, True]).tolist() == [[1, 2], [0, 0], [3, 4]]
    assert expanded(tensor, 1, [False, True, True]).tolist() == [[0, 1, 2], [0, 3, 4]]
    assert expanded(tensor[:0], 0, [False, False]).tolist() == [[0, 0], [0, 0]]
