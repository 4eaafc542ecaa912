"""Functions of tensors, as types: what each takes, and the sizes of what it gives.

One row a function. The rules work on symbolic sizes when a method is defined and on numbers when it meets a site;
`peftc.passes.expression.functions` has the same rows with what torch does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peftc.grammar.algebra.shapes import Dim, differ, product

Sizes = tuple[Dim, ...]
ONE = Dim.constant(1)

TASK = "task"  # the function of what a call says for each of its rows
MAX_AXES = 4
MAX_ROUNDS = 1000  # of what is repeated to come nearer

ACTIVATIONS = (
    *("gelu", "gelu_new", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu6", "sigmoid", "silu", "softplus"),
    *("swish", "tanh"),
)
WAVELETS = (
    *(f"db{taps}" for taps in range(1, 11)),
    *(f"sym{taps}" for taps in range(2, 11)),
    *(f"coif{taps}" for taps in range(1, 4)),
)


class MisfitError(Exception):
    """Operands whose sizes do not go together; says why."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Function:
    """`options` follow the operands in a call: their names and kinds (int, float, text, sizes)."""

    result: Callable[..., Sizes]
    operands: int = 1
    options: tuple[tuple[str, str], ...] = ()


def broadcast(left: Sizes, right: Sizes) -> Sizes:
    """The sizes of an elementwise operation, aligned at the last axis; a size of 1 stretches."""
    longer, shorter = (left, right) if len(left) >= len(right) else (right, left)
    lead = len(longer) - len(shorter)
    sizes = list(longer[:lead])
    for first, second in zip(longer[lead:], shorter, strict=True):
        if ONE not in (first, second) and differ(first, second):
            raise MisfitError("elementwise operators need equal sizes")
        sizes.append(second if first == ONE or (first.is_open and second != ONE) else first)
    return tuple(sizes)


def matmul(left: Sizes, right: Sizes) -> Sizes:
    """The sizes of `left @ right`, over equal leading axes."""
    if len(left) < 2 or len(right) < 2:
        raise MisfitError("'@' needs at least two axes on both sides")
    if differ(left[-1], right[-2]):
        raise MisfitError("'@' needs as many columns on its left as rows on its right")
    return (*broadcast(left[:-2], right[:-2]), left[-2], right[-1])


def transposed(sizes: Sizes) -> Sizes:
    """The sizes of `.T`."""
    if len(sizes) < 2:
        raise MisfitError("'.T' swaps the last two axes, and there is one")
    return (*sizes[:-2], sizes[-1], sizes[-2])


def axis_of(sizes: Sizes, axis: Dim) -> int:
    """An axis given by number."""
    number = axis.value
    if number is None or not 0 <= number < len(sizes):
        raise MisfitError(f"the axis is one of {', '.join(map(str, range(len(sizes))))}")
    return number


def _same(sizes: Sizes, *_: object) -> Sizes:
    return sizes


def _reduced(sizes: Sizes, axis: Dim) -> Sizes:
    return _with(sizes, axis_of(sizes, axis), ONE)


def _with(sizes: Sizes, axis: int, size: Dim) -> Sizes:
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _need(sizes: Sizes, axes: int, what: str) -> Sizes:
    if len(sizes) != axes:
        raise MisfitError(f"{what} takes {axes} ax{'i' if axes == 1 else 'e'}s, and this has {len(sizes)}")
    return sizes


def _square(sizes: Sizes, *_: object) -> Sizes:
    if len(sizes) < 2 or differ(sizes[-1], sizes[-2]):
        raise MisfitError("the last two axes must be of one size")
    return sizes


def _flat(sizes: Sizes) -> Sizes:
    if len(sizes) < 2:
        raise MisfitError("the last two axes are a matrix, and there is one axis")
    return sizes


def _qr(sizes: Sizes) -> Sizes:
    rows, columns = (each.value for each in _flat(sizes)[-2:])
    if rows is not None and columns is not None and columns > rows:
        raise MisfitError(f"{columns} columns of {rows} numbers cannot all be orthogonal")
    return sizes


def _neumann(sizes: Sizes, terms: Dim) -> Sizes:
    if terms.value is not None and not 1 <= terms.value <= MAX_ROUNDS:
        raise MisfitError(f"a series has 1 to {MAX_ROUNDS} terms, not {terms}")
    return _square(sizes)


def _diag(sizes: Sizes) -> Sizes:
    (size,) = _need(sizes, 1, "'diag'")
    return (size, size)


def _kron(left: Sizes, right: Sizes) -> Sizes:
    (a, b), (c, d) = _need(left, 2, "'kron'"), _need(right, 2, "'kron'")
    return (a * c, b * d)


def _block_diag(sizes: Sizes) -> Sizes:
    n, a, b = _need(sizes, 3, "'block_diag'")
    return (n * a, n * b)


def _blocks(sizes: Sizes) -> Sizes:
    m, n, a, b = _need(sizes, 4, "'blocks'")
    return (m * a, n * b)


def _skew(sizes: Sizes, size: Dim) -> Sizes:
    wanted = size * (size + -ONE)
    if differ(sizes[-1] * Dim.constant(2), wanted):
        raise MisfitError(
            f"a skew matrix of size {size} has {size} * ({size} - 1) / 2 numbers, and here are {sizes[-1]}"
        )
    return (*sizes[:-1], size, size)


def _reshape(sizes: Sizes, new: Sizes) -> Sizes:
    if differ(product(sizes), product(new)):
        raise MisfitError(f"{product(sizes)} numbers do not make {product(new)}")
    return new


def _permute(sizes: Sizes, axes: Sizes) -> Sizes:
    order = [each.value for each in axes]
    if sorted(each for each in order if each is not None) != list(range(len(sizes))):
        raise MisfitError(f"a permutation of {len(sizes)} axes names each once")
    return tuple(sizes[each] for each in order if each is not None)


def _tile(sizes: Sizes, counts: Sizes) -> Sizes:
    if len(counts) != len(sizes):
        raise MisfitError(f"'tile' takes one count for each of {len(sizes)} axes")
    return tuple(size * count for size, count in zip(sizes, counts, strict=True))


def _cycle(sizes: Sizes, size: Dim, axis: Dim) -> Sizes:
    return _with(sizes, axis_of(sizes, axis), size)


def _roll(sizes: Sizes, _: Dim, axis: Dim) -> Sizes:
    axis_of(sizes, axis)
    return sizes


def _slice(sizes: Sizes, axis: Dim, start: Dim, stop: Dim) -> Sizes:
    number = axis_of(sizes, axis)
    bounds = (start.value, stop.value, sizes[number].value)
    if None not in bounds[:2] and not 0 <= bounds[0] < bounds[1]:  # type: ignore[operator]
        raise MisfitError(f"{start} to {stop} is no part of an axis")
    if None not in bounds[1:] and bounds[1] > bounds[2]:  # type: ignore[operator]
        raise MisfitError(f"{start} to {stop} is not inside an axis of size {sizes[number]}")
    return _with(sizes, number, stop + -start)


def _concat(left: Sizes, right: Sizes, axis: Dim) -> Sizes:
    number = axis_of(left, axis)
    rest = _with(left, number, ONE), _with(right, number, ONE) if len(right) == len(left) else ()
    if len(left) != len(right) or any(map(differ, *rest)):
        raise MisfitError("'concat' needs equal sizes along the other axes")
    return _with(left, number, left[number] + right[number])


def _gather(sizes: Sizes, index: Sizes) -> Sizes:
    return (*index, *sizes[1:])


def _scatter(values: Sizes, index: Sizes, new: Sizes) -> Sizes:
    if len(values) != 1 or len(index) > 2 or differ(values[0], index[-1]):
        raise MisfitError("'scatter' takes one number for each index")
    if len(index) == 2 and index[0] != Dim.constant(len(new)):
        raise MisfitError(f"a place of a tensor of {len(new)} axes has {len(new)} coordinates")
    return new


def _count(sizes: Sizes, limit: Dim) -> Sizes:
    return (limit,)


def _largest(sizes: Sizes, count: Dim) -> Sizes:
    number, size = count.value, product(sizes).value
    if number is not None and size is not None and not 1 <= number <= size:
        raise MisfitError(f"of {size} numbers 1 to {size} can be the largest, not {number}")
    return (count,)


def _activation(sizes: Sizes, name: str | None) -> Sizes:
    if name is not None and name not in ACTIVATIONS:
        raise MisfitError(f"there is no activation '{name}', only {', '.join(ACTIVATIONS)}")
    return sizes


def _wavelet(sizes: Sizes, family: str | None) -> Sizes:
    if family is not None and family not in WAVELETS:
        raise MisfitError(f"there is no wavelet '{family}', only {', '.join(WAVELETS)}")
    return _need(sizes, 2, "'inverse_wavelet'")


def _choose(test: Sizes, chosen: Sizes, _: Dim) -> Sizes:
    return broadcast(test, chosen)


def _remainder(sizes: Sizes, divisor: Dim) -> Sizes:
    if divisor.value is not None and divisor.value < 1:
        raise MisfitError(f"a divisor is at least 1, not {divisor}")
    return sizes


def _circulant(sizes: Sizes) -> Sizes:
    return (*sizes, sizes[-1])


def _range_basis(sizes: Sizes, start: Sizes, rounds: Dim) -> Sizes:
    if rounds.value is not None and not 0 <= rounds.value <= MAX_ROUNDS:
        raise MisfitError(f"an iteration has 0 to {MAX_ROUNDS} rounds, not {rounds}")
    return _qr(matmul(sizes, start))


def _triu(sizes: Sizes, _: Dim) -> Sizes:
    if len(sizes) < 2:
        raise MisfitError("a triangle is part of a matrix, and there is one axis")
    return sizes


def _topk(sizes: Sizes, count: Dim) -> Sizes:
    number, size = count.value, sizes[-1].value
    if number is not None and size is not None and not 1 <= number <= size:
        raise MisfitError(f"'topk' of {size} numbers keeps 1 to {size}, not {number}")
    return sizes


def _left(sizes: Sizes, rank: Dim) -> Sizes:
    number = _rank(sizes, rank)
    return (sizes[0], number)


def _right(sizes: Sizes, rank: Dim) -> Sizes:
    return (_rank(sizes, rank), sizes[1])


def _values(sizes: Sizes, rank: Dim) -> Sizes:
    return (_rank(sizes, rank),)


def _rank(sizes: Sizes, rank: Dim) -> Dim:
    wanted, (rows, columns) = rank.value, (each.value for each in _need(sizes, 2, "a singular value decomposition"))
    if wanted is not None and rows is not None and columns is not None and not 1 <= wanted <= min(rows, columns):
        raise MisfitError(f"a matrix of {rows} x {columns} has {min(rows, columns)} singular values, not {wanted}")
    return rank


def _common_basis(sizes: Sizes, *_: object) -> Sizes:
    columns = _need(sizes, 3, "'common_basis'")[2]
    return (columns, columns)


def _solve(left: Sizes, right: Sizes) -> Sizes:
    _square(left)
    return matmul(left, right)


def _eye(*options: Dim) -> Sizes:
    return (options[0], options[0])


def _marks(size: Dim, _: Dim) -> Sizes:
    return (size,)


def _task(count: Dim) -> Sizes:
    if count.value is not None and count.value < 1:
        raise MisfitError(f"there is at least 1 task, not {count}")
    return (ONE,)


_AXIS = (("axis", "int"),)
_RANK = (("rank", "int"),)

FUNCTIONS: Mapping[str, Function] = {
    # elementwise
    **{
        name: Function(_same)
        for name in (
            *("abs", "cos", "exp", "gelu", "relu", "sigmoid", "sign", "silu", "sin", "sqrt", "stop_gradient", "tanh"),
        )
    },
    "activation": Function(_activation, options=(("name", "text"),)),
    "rounded": Function(_same, options=(("digits", "int"),)),  # to so many binary digits
    "equal": Function(_same, options=(("number", "int"),)),  # 1 where x is the number, else 0
    "remainder": Function(_remainder, options=(("divisor", "int"),)),
    "choose": Function(_choose, operands=2, options=(("otherwise", "int"),)),  # y where x is not 0
    "clamp": Function(_same, options=(("low", "float"), ("high", "float"))),
    # along an axis, which stays with size 1
    "mean": Function(_reduced, options=_AXIS),
    "norm": Function(_reduced, options=_AXIS),
    "std": Function(_reduced, options=_AXIS),
    "sum": Function(_reduced, options=_AXIS),
    "softmax": Function(_same),
    "topk": Function(_topk, options=(("count", "int"),)),
    # matrices made of smaller ones
    "block_diag": Function(_block_diag),
    "blocks": Function(_blocks),
    "circulant": Function(_circulant),
    "diag": Function(_diag),
    "eye": Function(_eye, operands=0, options=(("size", "int"),)),
    "kron": Function(_kron, operands=2),
    "skew": Function(_skew, options=(("size", "int"),)),
    # ones, of which training sets some to zero, others in every call: each with a probability, or so many
    "coins": Function(_marks, operands=0, options=(("size", "int"), ("p", "float"))),
    "thinned": Function(_marks, operands=0, options=(("size", "int"), ("zeros", "int"))),
    # what is each row's own in a call: its task; while training x plus numbers that are drawn for it
    TASK: Function(_task, operands=0, options=(("tasks", "int"),)),
    "noisy": Function(_same),
    # functions of whole matrices
    "cayley": Function(_square),
    "common_basis": Function(_common_basis, options=(("ridge", "float"),)),
    "expm": Function(_square),
    "ifft2": Function(_flat),
    "inverse": Function(_square),
    "inverse_wavelet": Function(_wavelet, options=(("family", "text"),)),
    "neumann": Function(_neumann, options=(("terms", "int"),)),  # 1 + x + x @ x + ...
    "left_singular": Function(_left, options=_RANK),
    "qr": Function(_qr),
    "triu": Function(_triu, options=(("diagonal", "int"),)),
    "range_basis": Function(_range_basis, operands=2, options=(("rounds", "int"),)),  # of x, nearly, from a start
    "right_singular": Function(_right, options=_RANK),
    "solve": Function(_solve, operands=2),
    "singular_values": Function(_values, options=_RANK),
    # how often each whole number below a limit occurs
    "count": Function(_count, options=(("limit", "int"),)),
    # the same numbers in other places
    "concat": Function(_concat, operands=2, options=_AXIS),
    "cycle": Function(_cycle, options=(("size", "int"), ("axis", "int"))),
    "gather": Function(_gather, operands=2),
    "largest": Function(_largest, options=(("count", "int"),)),
    "permute": Function(_permute, options=(("axes", "sizes"),)),
    "reshape": Function(_reshape, options=(("sizes", "sizes"),)),
    "roll": Function(_roll, options=(("shift", "int"), ("axis", "int"))),
    "scatter": Function(_scatter, operands=2, options=(("sizes", "sizes"),)),
    "slice": Function(_slice, options=(("axis", "int"), ("start", "int"), ("stop", "int"))),
    "tile": Function(_tile, options=(("counts", "sizes"),)),
}


def result(name: str, operands: Sequence[Sizes], options: Sequence[object]) -> Sizes:
    """The sizes a function gives. Raises MisfitError."""
    found = FUNCTIONS[name].result(*operands, *options)
    if len(found) > MAX_AXES:
        raise MisfitError(f"a tensor has at most {MAX_AXES} axes")
    for each in found:
        if each.value is not None and each.value < 1:
            raise MisfitError(f"a size is at least 1, not {each}")
    return found
