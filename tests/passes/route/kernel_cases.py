"""What Triton's interpreter gives, in a process of its own: `python -m tests.passes.route.kernel_cases`."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import copy

import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.passes.route import group_rows
from peftc.passes.route.by_seat import multiplied_by_seat
from peftc.passes.route.seat_kernel import product
from peftc.runtime.mixed_batch import row_pieces

SIZES = [(1, 1, 16, 16), (3, 1, 40, 8), (4, 5, 8, 100), (2, 17, 130, 65), (5, 2, 3, 1)]
"""Rows, tokens, in, out: smaller than a block, larger, and one more."""

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2}
"""The interpreter has no `tl.dot` of bfloat16; on a device that is tried before the kernel is used (`has_kernel`)."""


def products() -> None:
    """By a formula, for every type, whatever lies how."""
    for dtype, tolerance in TOLERANCES.items():
        for rows, tokens, inner, outer in SIZES:
            torch.manual_seed(rows)
            x, matrix = torch.randn(rows, tokens, inner).to(dtype), torch.randn(3, inner, outer).to(dtype)
            seats = torch.randint(0, 3, (rows,))
            wanted = torch.einsum("rni,rio->rno", x.double(), matrix[seats].double())
            turned = x.transpose(0, 1).contiguous().transpose(0, 1), matrix.mT.contiguous().mT
            for one, other in ((x, matrix), turned):
                made = product(one, other, seats)
                assert made.dtype == dtype
                assert_close(made.double(), wanted, atol=tolerance * inner**0.5, rtol=tolerance)


@torch.no_grad()
def model() -> None:
    """A model's rows, whose names change with every call, as one call each gives them."""
    row_pieces.has_kernel = lambda device: True
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).eval()
    spec = "adapter a = lora(rank = 4) { on 0, 2 }\nadapter b = lora(rank = 3) { on 0 }\nactivate a"
    adapted = compiler.apply(copy.deepcopy(net), spec)
    for each in adapted.adapter_bank.parameters():
        each.add_(torch.randn_like(each))
    x = torch.randn(4, 1, 24)
    alone = {"__base__": net(x)}
    for name in ("a", "b"):
        adapted.set_adapter(name)
        alone[name] = adapted(x)
    used = []
    group_rows.multiplied_by_seat = lambda *given: used.append(1) or multiplied_by_seat(*given)
    for names in (["b", "a", "a", "b"], ["__base__", "b", "b", "a"], ["a", "a", "b", "b"], ["b", "b", "a", "a"]):
        wanted = torch.stack([alone[name][row] for row, name in enumerate(names)])
        assert_close(adapted(x, adapter_names=names), wanted, atol=1e-5, rtol=1e-5)
    assert len(used) >= 4 * 2


if __name__ == "__main__":
    products()
    model()
    print("as wanted")
