"""Rows whose adapters change with every call, and then stay a while: what graphs read of them lies in other ways."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.testing import assert_close

from peftc import compiler
from peftc.passes.route import group_rows
from peftc.runtime.mixed_batch import row_pieces
from peftc.runtime.mixed_batch.groups import Arranged, Way
from tests import zoo

SPEC = """adapter one = lora(rank = 2, alpha = 8) { on q_proj, v_proj, down_proj }
adapter two = dora(rank = 5) { on q_proj, up_proj }
adapter six = ia3 { on k_proj }
activate one"""
BATCHES = (
    ["two", "one", "__base__", "six"],
    ["one", "two", "six", "__base__"],
    ["one", "one", "one", "two"],
    ["one", "one", "one", "two"],
    ["one", "one", "one", "two"],
    ["one", "one", "one", "two"],
    ["__base__", "one", "one", "two"],
    ["six", "six", "two", "two"],
    ["two", "two", "six", "six"],
)


def made(**options: Any) -> Any:
    return zoo.noisy(compiler.apply(zoo.make("llama"), SPEC, **options).eval())


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """How matrices were had, a region after the other."""
    found: list[Way] = []
    given = Arranged.given

    def counted(self: Arranged, way: Way, device: torch.device) -> Any:
        found.append(way)
        return given(self, way, device)

    monkeypatch.setattr(Arranged, "given", counted)
    return found


@pytest.fixture(params=["moved", "kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is a kernel: by its formula, which this device has."""
    if request.param == "kernel":
        monkeypatch.setattr(row_pieces, "has_kernel", lambda device: True)
        product = torch.no_grad()(lambda h, matrix, seats: torch.bmm(h, matrix[seats]))
        monkeypatch.setattr(group_rows, "multiplied_by_seat", product)
    return bool(request.param == "kernel")


def alone(model: Any, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(input_ids=ids[row : row + 1]).logits)
        else:
            model.set_adapter(name)
            rows.append(model(input_ids=ids[row : row + 1]).logits)
    model.set_adapter("one")
    return torch.cat(rows)


@pytest.mark.parametrize("regions", ["layers", "modules"])
@pytest.mark.parametrize("tokens", [1, 7, 150])
@torch.no_grad()
def test_rows_have_what_they_have_alone(tokens: int, regions: str, kernel: bool, ways: list[Way]) -> None:
    model = made(regions=regions)
    ids = torch.randint(3, 64, (4, tokens), generator=torch.Generator().manual_seed(tokens))
    wanted = [alone(model, ids, names) for names in BATCHES]
    for names, each in zip(BATCHES, wanted, strict=True):
        assert_close(model(input_ids=ids, adapter_names=names).logits, each, atol=1e-5, rtol=1e-5)
    expected = Way.BY_SEAT if kernel else Way.GROUPED
    assert (expected in ways) is (kernel or tokens < 100)
    assert set(ways) <= {Way.LAID_OUT, expected}


@torch.no_grad()
def test_tokens_of_generate(kernel: bool, ways: list[Way]) -> None:
    model, ids = made(), torch.randint(3, 64, (4, 5), generator=torch.Generator().manual_seed(0))
    more: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for names in BATCHES[:3]:
        wanted = []
        for row, name in enumerate(names):
            own = model.generate(input_ids=ids[row : row + 1], adapter_names=[name], **more)
            wanted.append(own)
        assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **more), torch.cat(wanted))
    assert {Way.LAID_OUT, Way.BY_SEAT if kernel else Way.GROUPED} <= set(ways)


def test_gradients_reach_each_rows_adapter(kernel: bool, ways: list[Way]) -> None:
    """A kernel has none, and is not asked."""
    model, names = made(), ["two", "one", "two", "one"]
    for name in ("one", "two"):
        model.set_requires_grad(name)
    ids = torch.randint(3, 64, (4, 1), generator=torch.Generator().manual_seed(0))

    def gradients(rows: slice) -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids[rows], adapter_names=names[rows], use_cache=False).logits
        logits.square().sum().backward()
        return [torch.zeros(1) if each.grad is None else each.grad for each in model.adapter_bank.parameters()]

    together = gradients(slice(None))
    apart = [gradients(slice(row, row + 1)) for row in range(4)]
    for whole, *parts in zip(together, *apart, strict=True):
        assert_close(whole, torch.stack(torch.broadcast_tensors(*parts)).sum(0), atol=1e-4, rtol=1e-4)
    assert Way.BY_SEAT not in ways
    assert Way.GROUPED in ways


def test_gradients_of_what_is_given_after_calls_without(kernel: bool) -> None:
    """The same rows, first without gradients and then with: what has none is no longer read."""
    model, names = made(), ["one", "one", "one", "two"]
    for each in model.parameters():
        each.requires_grad_(False)
    embedded = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(inputs_embeds=embedded, adapter_names=names).logits
    embedded.requires_grad_()
    found = model(inputs_embeds=embedded, adapter_names=names).logits
    assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.square().sum(), embedded)
    single = embedded.detach().requires_grad_()
    rows = [model(inputs_embeds=single[row : row + 1], adapter_names=[name]).logits for row, name in enumerate(names)]
    (expected,) = torch.autograd.grad(torch.cat(rows).square().sum(), single)
    assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("before", range(4))
def test_what_a_backward_pass_runs_again(before: int, kernel: bool) -> None:
    """However often the rows had the same: a checkpoint compares what is kept for gradients."""
    model, names = made(), ["one", "one", "one", "two"]
    for each in model.parameters():
        each.requires_grad_(False)
    embedded = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(inputs_embeds=x, adapter_names=names, use_cache=False).logits
        return logits

    (wanted,) = torch.autograd.grad(run(embedded).square().sum(), embedded)
    for _ in range(before):
        run(embedded)
    again = torch.utils.checkpoint.checkpoint(run, embedded, use_reentrant=False)
    (found,) = torch.autograd.grad(again.square().sum(), embedded)
    assert_close(found, wanted, atol=1e-5, rtol=1e-5)
