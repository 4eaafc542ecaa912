"""The product of rows with matrices that lie by adapter, in one CUDA kernel: nothing is laid out, moved or filled up.

Needs Triton, and so is imported where there is a CUDA device only.
"""

from typing import Any

import torch
import triton
import triton.language as tl

TOKENS, INNER, OUTER = 16, 64, 64
"""The sizes of a block; `tl.dot` takes no smaller ones than 16."""


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x,
    matrix,
    seats,
    y,
    tokens,
    inner,
    outer,
    x_row,
    x_token,
    x_inner,
    matrix_seat,
    matrix_inner,
    matrix_outer,
    y_row,
    y_token,
    token_block: tl.constexpr,
    inner_block: tl.constexpr,
    outer_block: tl.constexpr,
):
    row = tl.program_id(0)
    token = tl.program_id(1) * token_block + tl.arange(0, token_block)
    column = tl.program_id(2) * outer_block + tl.arange(0, outer_block)
    own = matrix + tl.load(seats + row) * matrix_seat
    total = tl.zeros((token_block, outer_block), dtype=tl.float32)
    for start in range(0, inner, inner_block):
        k = start + tl.arange(0, inner_block)
        left = tl.load(
            x + row * x_row + token[:, None] * x_token + k[None, :] * x_inner,
            mask=(token[:, None] < tokens) & (k[None, :] < inner),
            other=0.0,
        )
        right = tl.load(
            own + k[:, None] * matrix_inner + column[None, :] * matrix_outer,
            mask=(k[:, None] < inner) & (column[None, :] < outer),
            other=0.0,
        )
        total += tl.dot(left, right, input_precision="ieee")
    tl.store(
        y + row * y_row + token[:, None] * y_token + column[None, :],
        total.to(y.dtype.element_ty),
        mask=(token[:, None] < tokens) & (column[None, :] < outer),
    )


def product(x: torch.Tensor, matrix: torch.Tensor, seats: torch.Tensor) -> torch.Tensor:
    """`x[row] @ matrix[seats[row]]` for each row.

    Args:
        x: `[rows, tokens, in]`, float32, float16 or bfloat16.
        matrix: `[adapters, in, out]`, of the same type.
        seats: `[rows]`, int64: which adapter each row has.

    Returns:
        `[rows, tokens, out]` of the type of `x`; sums are float32. It has no gradient.
    """
    rows, tokens, inner = x.shape
    outer = matrix.shape[2]
    y = x.new_empty(rows, tokens, outer)
    grid = (rows, triton.cdiv(tokens, TOKENS), triton.cdiv(outer, OUTER))
    launch: Any = _product[grid]
    launch(
        *(x, matrix, seats, y, tokens, inner, outer),
        *(*x.stride(), *matrix.stride(), *y.stride()[:2]),
        token_block=TOKENS,
        inner_block=INNER,
        outer_block=OUTER,
    )
    return y
