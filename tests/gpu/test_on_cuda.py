"""What runs otherwise on a CUDA device than on a CPU: `python -m pytest tests/gpu` on a machine that has one."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from peftc.passes.route.by_seat import TYPES, has_kernel, multiplied_by_seat
from peftc.runtime.mixed_batch import row_pieces
from tests import zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SPEC = """adapter a = lora(rank = 4) { on q_proj, v_proj, up_proj }
adapter b = dora(rank = 2) { on q_proj, down_proj }
activate a"""
BATCHES = (
    ["a", "b", "__base__", "a"],
    ["b", "a", "a", "a"],
    ["b", "a", "a", "a"],
    ["b", "a", "a", "a"],
    ["__base__", "b", "b", "a"],
)
SIZES = [(1, 1, 16, 16), (3, 1, 40, 8), (4, 5, 8, 100), (2, 17, 130, 65), (5, 2, 3, 1), (16, 1, 4096, 8)]


def made() -> Any:
    return zoo.noisy(compiler.apply(zoo.make("llama"), SPEC).eval())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "tokens", "inner", "outer"), SIZES)
def test_the_kernel(rows: int, tokens: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    x, matrix = torch.randn(rows, tokens, inner, device="cuda"), torch.randn(3, inner, outer, device="cuda")
    x, matrix, seats = x.to(dtype), matrix.to(dtype), torch.randint(0, 3, (rows,), device="cuda")
    wanted = torch.einsum("rni,rio->rno", x.double(), matrix[seats].double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    made = multiplied_by_seat(x, matrix, seats).double()
    assert_close(made, wanted, atol=tolerance * inner**0.5, rtol=tolerance)


def test_there_is_a_kernel() -> None:
    assert has_kernel(torch.device("cuda", 0))


@pytest.mark.parametrize("kernel", [True, False])
@torch.no_grad()
def test_rows_whose_adapters_change(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(row_pieces, "has_kernel", lambda device: False)
    here, there = made(), made().to("cuda")
    for tokens in (1, 9):
        ids = torch.randint(3, 64, (4, tokens), generator=torch.Generator().manual_seed(tokens))
        for names in BATCHES:
            wanted = here(input_ids=ids, adapter_names=names).logits
            found = there(input_ids=ids.cuda(), adapter_names=names).logits
            assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-4)


def test_a_step_and_tokens() -> None:
    here, there = made(), made().to("cuda")
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
    for model, own in ((here, ids), (there, ids.cuda())):
        model.train()
        model(input_ids=own, labels=own, use_cache=False).loss.backward()
        model.eval()
    for one, other in zip(here.adapter_bank.parameters(), there.adapter_bank.parameters(), strict=True):
        assert (one.grad is None) is (other.grad is None)
        if one.grad is not None and other.grad is not None:
            assert_close(other.grad.cpu(), one.grad, atol=1e-4, rtol=1e-3)
    more: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    tokens = there.generate(input_ids=ids.cuda(), adapter_names=BATCHES[0], **more)
    assert torch.equal(tokens.cpu(), here.generate(input_ids=ids, adapter_names=BATCHES[0], **more))
