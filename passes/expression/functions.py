"""Functions of tensors, as torch computes them: the same rows as in `peftc.grammar.algebra.functions`.

Values may have one axis in front of their own, for the experts of a stack (`lead` is 1): lowerings count axes from the
end. `ops` calls an operator at once or makes a node, so that merging and graphs share every line.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from peftc.grammar.algebra.algebra import Option
from peftc.grammar.algebra.functions import TASK
from peftc.passes.expression.activations import activation
from peftc.passes.expression.draws import coins, for_all, noisy, thinned
from peftc.passes.expression.precision import Lowering, clamp, in_float32
from peftc.passes.expression.scene import LoweringContext
from peftc.passes.expression.wavelets import low_pass

aten = torch.ops.aten
T = TypeVar("T")


def _plain(op: Callable[..., Any]) -> Lowering:
    return lambda scene, operands, options: scene.call(op, *operands, *options)


def _along(op: Callable[..., Any], *before: Any) -> Lowering:
    """A reduction that keeps its axis."""
    return lambda scene, operands, options: scene.call(
        op, operands[0], *before, [scene.axis(operands[0], options[0])], True
    )


def _std(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,), (axis,) = operands, options
    return scene.call(aten.std.correction, x, [scene.axis(x, axis)], correction=1, keepdim=True)


def _rounded(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    parts = scene.call(aten.frexp.Tensor, operands[0])
    mantissa, exponent = (scene.call(operator.getitem, parts, each) for each in (0, 1))
    assert isinstance(options[0], int)
    scale = 2.0 ** options[0]
    whole = scene.call(aten.round.default, scene.call(aten.mul.Tensor, mantissa, scale))
    return scene.call(aten.ldexp.Tensor, scene.call(aten.mul.Tensor, whole, 1 / scale), exponent)


def _equal(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    """In the type of what is compared, so that whole numbers stay whole."""
    (x,) = operands
    return scene.call(aten.to.dtype, scene.call(aten.eq.Scalar, x, options[0]), scene.kind(x)["dtype"])


def _choose(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    axes = max(map(scene.own, operands))
    test, x = (
        scene.reshape(each, [*[1] * (axes - scene.own(each)), *scene.sizes(each)[scene.lead :]]) for each in operands
    )
    return scene.call(aten.where.ScalarOther, scene.call(aten.ne.Scalar, test, 0), x, options[0])


def _count(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,), (limit,) = operands, options
    sizes = scene.sizes(x)
    flat = scene.reshape(x, [math.prod(sizes[scene.lead :])])
    once = scene.call(aten.ones_like.default, flat, dtype=scene.kind(scene.example)["dtype"])
    none = scene.call(aten.zeros.default, [*sizes[: scene.lead], limit], **scene.kind(once))
    return scene.call(aten.scatter_add.default, none, -1, flat, once)


def _softmax(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    return scene.call(aten.softmax.int, operands[0], -1)


def _largest(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    flat = scene.reshape(operands[0], [math.prod(scene.sizes(operands[0])[scene.lead :])])
    return scene.call(operator.getitem, scene.call(aten.topk.default, flat, options[0]), 1)


def _topk(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,) = operands
    places = scene.call(operator.getitem, scene.call(aten.topk.default, x, options[0]), 1)
    kept = scene.call(aten.scatter.value, scene.call(aten.zeros_like.default, x), -1, places, 1.0)
    return scene.call(aten.where.ScalarOther, scene.call(aten.gt.Scalar, kept, 0.5), x, float("-inf"))


# --- matrices made of smaller ones ---


def _block_diag(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    (x,) = operands
    n, a, b = scene.sizes(x)[-3:]
    apart = scene.call(aten.diag_embed.default, scene.call(aten.movedim.int, x, -3, -1), 0, -4, -2)  # [n, a, n, b]
    return scene.reshape(apart, [n * a, n * b])


def _blocks(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    (x,) = operands
    m, n, a, b = scene.sizes(x)[-4:]
    return scene.reshape(scene.call(aten.transpose.int, x, -3, -2), [m * a, n * b])


def _circulant(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    (x,) = operands
    *rest, size = scene.sizes(x)[scene.lead :]
    places = scene.arange(size)
    shift = scene.call(aten.sub.Tensor, scene.call(aten.unsqueeze.default, places, 1), places)
    flat = scene.call(aten.reshape.default, scene.call(aten.remainder.Scalar, shift, size), [-1])
    return scene.reshape(scene.call(aten.index_select.default, x, -1, flat), [*rest, size, size])


def _diag(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    return scene.call(aten.diag_embed.default, operands[0])


def _eye(scene: LoweringContext[T], _: Sequence[T], options: Sequence[Option]) -> T:
    return for_all(scene, scene.call(aten.eye.default, options[0], **scene.kind(scene.example)))


def _task(scene: LoweringContext[T], _: Sequence[T], __: Sequence[Option]) -> T:
    assert scene.task is not None, "a task is known where rows of a call have adapters of their own"
    return for_all(scene, scene.task)


def _kron(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    left, right = operands
    (a, b), (c, d) = scene.sizes(left)[-2:], scene.sizes(right)[-2:]
    spread = scene.reshape(left, [a, 1, b, 1]), scene.reshape(right, [1, c, 1, d])
    return scene.reshape(scene.call(aten.mul.Tensor, *spread), [a * c, b * d])


def _skew(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,) = operands
    (size,) = options
    assert isinstance(size, int)
    pairs = scene.call(aten.triu_indices.default, size, size, 1, device=scene.ops.tensor(x).device)
    rows, columns = (scene.call(aten.select.int, pairs, 0, each) for each in (0, 1))
    flat = scene.call(aten.add.Tensor, scene.call(aten.mul.Tensor, rows, size), columns)
    *rest, _ = scene.sizes(x)
    empty = scene.call(aten.zeros.default, [*rest, size * size], **scene.kind(x))
    filled = scene.call(aten.index_copy.default, empty, -1, flat, x)
    upper = scene.call(aten.reshape.default, filled, [*rest, size, size])
    return scene.call(aten.sub.Tensor, upper, scene.call(aten.transpose.int, upper, -1, -2))


# --- functions of whole matrices ---


def _cayley(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    (x,) = operands
    one = scene.call(aten.eye.default, scene.sizes(x)[-1], **scene.kind(x))
    plus, minus = scene.call(aten.add.Tensor, one, x), scene.call(aten.sub.Tensor, one, x)
    return scene.call(aten.linalg_solve.default, plus, minus, left=False)


def _ifft2(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    return scene.call(aten.real.default, scene.call(aten.fft_ifft2.default, operands[0]))


def _inverse_wavelet(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    """The matrix in the middle of a grid of zeros, one step back from its four quarters, and the middle of that."""
    (x,) = operands
    low = low_pass(str(options[0]))
    taps, (rows, columns) = len(low), scene.sizes(x)[-2:]
    tall, wide = (size + taps - 2 + size % 2 for size in (rows, columns))
    top, left = (tall - rows) // 2, (wide - columns) // 2
    grid = scene.call(aten.constant_pad_nd.default, x, [left, wide - columns - left, top, tall - rows - top])
    apart = scene.call(aten.reshape.default, grid, [-1, 2, tall // 2, 2, wide // 2])
    quarters = scene.call(aten.permute.default, apart, [0, 1, 3, 2, 4])
    channels = scene.call(aten.reshape.default, quarters, [-1, 4, tall // 2, wide // 2])
    # Low pass in front, its mirror with alternating signs behind. The right half of the grid is high in rows.
    high = tuple((-1) ** place * each for place, each in enumerate(reversed(low)))
    numbers = [scene.call(aten.scalar_tensor.default, each, **scene.kind(x)) for each in (*low, *high)]
    both = scene.call(aten.reshape.default, scene.call(aten.stack.default, numbers), [2, taps])
    across = scene.call(aten.reshape.default, both, [2, 1, 1, taps])  # bottom: high in columns
    down = scene.call(aten.reshape.default, both, [1, 2, taps, 1])
    bank = scene.call(aten.reshape.default, scene.call(aten.mul.Tensor, across, down), [4, 1, taps, taps])
    made = scene.call(aten.conv_transpose2d.input, channels, bank, None, [2, 2], [taps - 2, taps - 2])
    for axis, size, whole in ((-2, rows, tall - taps + 2), (-1, columns, wide - taps + 2)):
        made = scene.call(aten.slice.Tensor, made, axis, (whole - size) // 2, (whole - size) // 2 + size)
    return scene.call(aten.reshape.default, made, scene.sizes(x))


def _neumann(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,), (terms,) = operands, options
    assert isinstance(terms, int)
    one = scene.call(aten.eye.default, scene.sizes(x)[-1], **scene.kind(x))
    found = scene.call(aten.add.Tensor, one, x) if terms > 1 else scene.call(aten.expand.default, one, scene.sizes(x))
    for _ in range(terms - 2):
        found = scene.call(aten.add.Tensor, one, scene.call(aten.matmul.default, x, found))
    return found


def _common_basis(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    """V of the higher-order generalised singular value decomposition: every matrix of the stack is U * s @ V.T."""
    (x,), (ridge,) = operands, options
    count, rows, columns = scene.sizes(x)[-3:]
    flat = scene.reshape(x, [count * rows, columns])
    if count * rows < columns:
        right = scene.call(operator.getitem, scene.call(aten.linalg_svd.default, flat, True), 2)
        return scene.call(aten.transpose.int, right, -1, -2)
    parts = scene.call(aten.linalg_qr.default, flat)
    q, r = (scene.call(operator.getitem, parts, each) for each in (0, 1))
    q = scene.reshape(q, [count, rows, columns])
    gram = scene.call(aten.matmul.default, scene.call(aten.transpose.int, q, -1, -2), q)
    one = scene.call(aten.mul.Tensor, scene.call(aten.eye.default, columns, **scene.kind(x)), ridge)
    inverses = scene.call(aten.linalg_inv.default, scene.call(aten.add.Tensor, gram, one))
    mean = scene.call(aten.div.Tensor, scene.call(aten.sum.dim_IntList, inverses, [-3]), count)
    vectors = scene.call(operator.getitem, scene.call(aten.linalg_eigh.default, mean), 1)
    return scene.call(aten.matmul.default, scene.call(aten.transpose.int, r, -1, -2), vectors)


def _solve(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    """In double precision: what is solved for is often nearly singular."""
    left, right = (scene.call(aten.to.dtype, each, torch.float64) for each in operands)
    return scene.call(
        aten.to.dtype, scene.call(aten.linalg_solve.default, left, right), scene.kind(operands[1])["dtype"]
    )


def _qr(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    return scene.call(operator.getitem, scene.call(aten.linalg_qr.default, operands[0]), 0)


def _range_basis(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    """Subspace iteration (Halko et al. 2011, algorithm 4.4)."""
    (x, start), (rounds,) = operands, options
    assert isinstance(rounds, int)
    turned = scene.call(aten.transpose.int, x, -1, -2)
    basis = _qr(scene, [scene.call(aten.matmul.default, x, start)], ())
    for side in (turned, x) * rounds:
        basis = _qr(scene, [scene.call(aten.matmul.default, side, basis)], ())
    return basis


def _singular(part: int) -> Lowering:
    def lower(scene: LoweringContext[Any], operands: Sequence[Any], options: Sequence[Option]) -> Any:
        found = scene.call(operator.getitem, scene.call(aten.linalg_svd.default, operands[0], False), part)
        return scene.call(aten.slice.Tensor, found, -2 if part == 2 else -1, 0, options[0])

    return lower


# --- the same numbers in other places ---


def _level(scene: LoweringContext[T], values: Sequence[T]) -> list[T]:
    """The values with equally many leading rows: what a stack shares is repeated for each expert."""
    leads = [scene.sizes(each)[: scene.lead] for each in values]
    most = max(leads)
    return [
        each if lead == most else scene.call(aten.expand.default, each, [*most, *scene.sizes(each)[scene.lead :]])
        for each, lead in zip(values, leads, strict=True)
    ]


def _concat(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    return scene.call(aten.cat.default, _level(scene, operands), scene.axis(operands[0], options[0]))


def _cycle(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,), (size, axis) = operands, options
    assert isinstance(size, int)
    at, counts = scene.axis(x, axis), [1] * len(scene.sizes(x))
    counts[at] = -(-size // scene.sizes(x)[at])
    return scene.call(aten.slice.Tensor, scene.call(aten.repeat.default, x, counts), at, 0, size)


def _gather(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    x, index = operands
    index = scene.call(aten.to.dtype, index, torch.int64)
    if not scene.lead:
        return scene.call(aten.index.Tensor, x, [index])
    if scene.sizes(x)[0] == 1:  # what a stack shares; each expert has its own indices into it
        return scene.call(aten.index.Tensor, scene.call(aten.select.int, x, 0, 0), [index])
    experts = scene.arange(scene.sizes(x)[0])
    experts = scene.call(aten.reshape.default, experts, [-1, *[1] * scene.own(index)])
    return scene.call(aten.index.Tensor, x, [experts, index])


def _permute(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,), (axes,) = operands, options
    assert isinstance(axes, tuple)
    return scene.call(aten.permute.default, x, [*range(scene.lead), *(each + scene.lead for each in axes)])


def _reshape(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    assert isinstance(options[0], tuple)
    return scene.reshape(operands[0], options[0])


def _roll(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,), (shift, axis) = operands, options
    return scene.call(aten.roll.default, x, [shift], [scene.axis(x, axis)])


def _flat(scene: LoweringContext[T], coordinates: T, sizes: tuple[int, ...]) -> T:
    """Row-major indices of places given by a row of coordinates for each axis."""
    flat, *rest = [scene.call(aten.select.int, coordinates, -2, axis) for axis in range(len(sizes))]
    for size, each in zip(sizes[1:], rest, strict=True):
        flat = scene.call(aten.add.Tensor, scene.call(aten.mul.Tensor, flat, size), each)
    return flat


def _scatter(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (values, index), (sizes,) = _level(scene, operands), options
    assert isinstance(sizes, tuple)
    count = math.prod(sizes)
    empty = scene.call(aten.zeros.default, [*scene.sizes(values)[:-1], count], **scene.kind(values))
    index = scene.call(aten.to.dtype, index, torch.int64)
    if scene.own(index) == 2:
        index = _flat(scene, index, sizes)
    index = scene.call(aten.expand.default, index, scene.sizes(values))
    return scene.reshape(scene.call(aten.scatter_add.default, empty, -1, index, values), sizes)


def _slice(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    (x,), (axis, start, stop) = operands, options
    return scene.call(aten.slice.Tensor, x, scene.axis(x, axis), start, stop)


def _tile(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    assert isinstance(options[0], tuple)
    return scene.call(aten.repeat.default, operands[0], [*[1] * scene.lead, *options[0]])


LOWERINGS: Mapping[str, Lowering] = {
    "abs": _plain(aten.abs.default),
    "activation": activation,
    "block_diag": _block_diag,
    "blocks": _blocks,
    "cayley": in_float32(_cayley),
    "choose": _choose,
    "circulant": _circulant,
    "clamp": clamp,
    "common_basis": in_float32(_common_basis),
    "concat": _concat,
    "cos": _plain(aten.cos.default),
    "count": _count,
    "cycle": _cycle,
    "diag": _diag,
    "equal": _equal,
    "exp": _plain(aten.exp.default),
    "expm": in_float32(_plain(aten.linalg_matrix_exp.default)),
    "coins": coins,
    "thinned": thinned,
    "eye": _eye,
    "gather": _gather,
    "gelu": _plain(aten.gelu.default),
    "ifft2": in_float32(_ifft2),
    "inverse": in_float32(_plain(aten.linalg_inv.default)),
    "inverse_wavelet": _inverse_wavelet,
    "kron": _kron,
    "largest": _largest,
    "left_singular": in_float32(_singular(0)),
    "mean": _along(aten.mean.dim),
    "neumann": _neumann,
    "noisy": noisy,
    "norm": _along(aten.linalg_vector_norm.default, 2),
    "permute": _permute,
    "qr": in_float32(_qr),
    "range_basis": in_float32(_range_basis),
    "reciprocal": _plain(aten.reciprocal.default),
    "relu": _plain(aten.relu.default),
    "remainder": _plain(aten.remainder.Scalar),
    "reshape": _reshape,
    "right_singular": in_float32(_singular(2)),
    "roll": _roll,
    "rounded": _rounded,
    "scatter": _scatter,
    "shift": _plain(aten.add.Tensor),
    "sigmoid": _plain(aten.sigmoid.default),
    "sign": _plain(aten.sign.default),
    "silu": _plain(aten.silu.default),
    "sin": _plain(aten.sin.default),
    "singular_values": in_float32(_singular(1)),
    "skew": _skew,
    "slice": _slice,
    "solve": _solve,
    "softmax": _softmax,
    "sqrt": _plain(aten.sqrt.default),
    "std": _std,
    "stop_gradient": _plain(aten.detach.default),
    "sum": _along(aten.sum.dim_IntList),
    TASK: _task,
    "tanh": _plain(aten.tanh.default),
    "tile": _tile,
    "topk": _topk,
    "triu": _plain(aten.triu.default),
}
