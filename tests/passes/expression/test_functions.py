"""What torch does for each function of tensors: by hand, as sizes, as nodes, and for a stack of experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc.grammar.algebra import algebra as al
from peftc.grammar.algebra.functions import FUNCTIONS
from peftc.grammar.algebra.measure import sizes_of
from peftc.passes.expression.functions import LOWERINGS
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.expression.scene import Eager
from peftc.passes.ir.emit import Emit, Origin

F64 = torch.float64
EXPERTS = 3
TASK = torch.tensor([2])


@dataclass(frozen=True)
class Case:
    """Sizes of the operands, options, and what comes out; `limit` makes the last operand whole numbers below it."""

    shapes: tuple[tuple[int, ...], ...]
    options: tuple[Any, ...]
    reference: Callable[..., torch.Tensor]
    limit: int = 0
    positive: bool = False

    def tensors(self, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator, dtype=F64) for shape in self.shapes]
        if self.positive:
            made = [each.abs() for each in made]
        if self.limit:
            made[-1] = torch.randint(self.limit, self.shapes[-1], generator=generator)
        return made


def spread(sizes, index, values):
    made = torch.zeros(sizes, dtype=values.dtype)
    for at, value in zip(index.tolist(), values, strict=True):
        made.view(-1)[at] += value
    return made


def skewed(x, size):
    made = torch.zeros(*x.shape[:-1], size, size, dtype=x.dtype)
    rows, columns = zip(*[(i, j) for i in range(size) for j in range(i + 1, size)], strict=True)
    made[..., rows, columns], made[..., columns, rows] = x, -x
    return made


def circulants(x):
    return torch.stack([x.roll(each, -1) for each in range(x.shape[-1])], dim=-1)


def kept(x, count):
    least = x.sort(-1, descending=True).values[..., count - 1 : count]
    return x.masked_fill(x < least, float("-inf"))


def wavelet(x):
    """One Haar step back: the right half of the quarters is what differs from row to row."""
    (a, b), (c, d) = [each.chunk(2, -1) for each in x.chunk(2, -2)]
    made = torch.empty_like(x)
    made[0::2, 0::2], made[0::2, 1::2] = a + b + c + d, a + b - c - d
    made[1::2, 0::2], made[1::2, 1::2] = a - b + c - d, a - b - c + d
    return made / 2


def rounded(x, digits):
    scale = 2.0 ** (digits - 1 - x.abs().log2().floor())
    return (x * scale).round() / scale


def basis(x, start):
    """One round: into the rows' space and back."""
    for side in (x, x.T, x):
        start = torch.linalg.qr(side @ start).Q
    return start


def joint(x, ridge):
    """What the matrices of the stack have in common: R.T, turned to where their shares of Q agree least."""
    q, r = torch.linalg.qr(x.flatten(0, 1))
    one = torch.eye(x.shape[-1], dtype=x.dtype)
    inverses = [torch.inverse(part.T @ part + ridge * one) for part in q.split(x.shape[-2])]
    return r.T @ torch.linalg.eigh(sum(inverses) / len(inverses)).eigenvectors


ELEMENTWISE = {
    **{name: getattr(torch, name) for name in ("abs", "cos", "exp", "relu", "sigmoid", "sign", "sin", "tanh")},
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "stop_gradient": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
    "reciprocal": lambda x: 1 / x,
}
EYE = torch.eye(4, dtype=F64)
CASES = {
    **{(name, ""): Case(((2, 3),), (), reference) for name, reference in ELEMENTWISE.items()},
    **{
        ("activation", name): Case(((2, 3),), (name,), reference)
        for name, reference in {
            "linear": lambda x: x,
            "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
            "relu6": lambda x: x.clamp(0, 6),
            "swish": lambda x: x * x.sigmoid(),
            "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
            "softplus": lambda x: (1 + x.exp()).log(),
            "mish": lambda x: x * (1 + x.exp()).log().tanh(),
            "gelu_new": lambda x: 0.5 * x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
        }.items()
    },
    ("sqrt", ""): Case(((2, 3),), (), torch.sqrt, positive=True),
    ("shift", ""): Case(((2, 3),), (0.5,), lambda x: x + 0.5),
    ("clamp", ""): Case(((2, 3),), (-0.5, 0.25), lambda x: x.minimum(x.new_tensor(0.25)).maximum(x.new_tensor(-0.5))),
    ("rounded", ""): Case(((2, 3),), (4,), lambda x: rounded(x, 4)),
    ("mean", ""): Case(((2, 3),), (0,), lambda x: x.sum(0, keepdim=True) / 2),
    ("norm", ""): Case(((2, 3),), (1,), lambda x: (x * x).sum(1, keepdim=True).sqrt()),
    ("std", ""): Case(((5, 3),), (0,), lambda x: ((x - x.mean(0)).square().sum(0, keepdim=True) / 4).sqrt()),
    ("sum", ""): Case(((2, 3, 4),), (2,), lambda x: x @ torch.ones(4, 1, dtype=F64)),
    ("topk", ""): Case(((3, 5),), (2,), lambda x: kept(x, 2)),
    ("largest", ""): Case(((3, 2),), (4,), lambda x: x.flatten().argsort(descending=True)[:4]),
    ("count", ""): Case(((2, 4),), (3,), lambda x: torch.stack([(x == n).sum() for n in range(3)]).to(F64), limit=3),
    ("block_diag", ""): Case(((2, 3, 4),), (), lambda x: torch.block_diag(*x)),
    ("blocks", ""): Case(((2, 3, 4, 5),), (), lambda x: torch.cat([torch.cat(list(row), 1) for row in x])),
    ("choose", ""): Case(((2, 4), (4,)), (-100,), lambda test, x: (test == 0) * -100 + (test != 0) * x, limit=3),
    ("equal", ""): Case(((2, 4),), (1,), lambda x: (x == 1).to(x.dtype), limit=3),
    ("remainder", ""): Case(((2, 4),), (3,), lambda x: x - 3 * (x / 3).floor()),
    ("circulant", ""): Case(((2, 4),), (), circulants),
    ("diag", ""): Case(((3,),), (), torch.diag),
    ("coins", ""): Case((), (4, 0.5), lambda: torch.ones(4, dtype=F64)),
    ("thinned", ""): Case((), (4, 2), lambda: torch.ones(4, dtype=F64)),
    ("noisy", ""): Case(((2, 3),), (), lambda x: x),
    ("task", ""): Case((), (4,), lambda: TASK),
    ("eye", ""): Case((), (4,), lambda: EYE),
    ("kron", ""): Case(((2, 3), (4, 1)), (), torch.kron),
    ("skew", ""): Case(((2, 6),), (4,), lambda x: skewed(x, 4)),
    ("cayley", ""): Case(((2, 4, 4),), (), lambda x: (EYE - x) @ (EYE + x).inverse()),
    ("expm", ""): Case(((4, 4),), (), torch.matrix_exp),
    ("ifft2", ""): Case(((3, 4),), (), lambda x: torch.fft.ifft2(x).real),
    ("inverse", ""): Case(((4, 4),), (), torch.inverse),
    ("inverse_wavelet", ""): Case(((4, 6),), ("db1",), wavelet),
    ("neumann", ""): Case(((4, 4),), (4,), lambda x: EYE + x + x @ x + x @ x @ x),
    ("neumann", "one"): Case(((4, 4),), (1,), lambda x: EYE),
    ("left_singular", ""): Case(((5, 4),), (2,), lambda x: torch.svd(x).U[:, :2]),
    ("right_singular", ""): Case(((5, 4),), (2,), lambda x: torch.svd(x).V[:, :2].T),
    ("singular_values", ""): Case(((5, 4),), (2,), lambda x: torch.svd(x).S[:2]),
    ("common_basis", ""): Case(((3, 2, 4),), (0.1,), lambda x: joint(x, 0.1)),
    ("common_basis", "of few rows"): Case(((1, 2, 4),), (0.1,), lambda x: torch.linalg.svd(x[0]).Vh.T),
    ("solve", ""): Case(((4, 4), (4, 2)), (), lambda a, b: torch.inverse(a) @ b),
    ("qr", ""): Case(((5, 3),), (), lambda x: torch.linalg.qr(x).Q),
    ("range_basis", ""): Case(((5, 4), (4, 2)), (1,), basis),
    ("triu", ""): Case(((3, 4),), (1,), lambda x: x * (torch.arange(4) > torch.arange(3)[:, None])),
    ("concat", ""): Case(((2, 3), (4, 3)), (0,), lambda a, b: torch.vstack((a, b))),
    ("cycle", ""): Case(((2, 3),), (7, 1), lambda x: x[:, [0, 1, 2, 0, 1, 2, 0]]),
    ("cycle", "shorter"): Case(((2, 3),), (2, 1), lambda x: x[:, :2]),
    ("gather", ""): Case(((4, 3), (2, 5)), (), lambda x, index: x[index], limit=4),
    ("permute", ""): Case(((2, 3, 4),), ((2, 0, 1),), lambda x: x.movedim(-1, 0)),
    ("reshape", ""): Case(((2, 6),), ((3, 2, 2),), lambda x: x.view(3, 2, 2)),
    ("roll", ""): Case(((2, 5),), (2, 1), lambda x: x[:, [3, 4, 0, 1, 2]]),
    ("scatter", ""): Case(((5,), (5,)), ((2, 3),), lambda values, index: spread((2, 3), index, values), limit=6),
    ("scatter", "coordinates"): Case(
        ((4,), (2, 4)), ((3, 3),), lambda values, at: spread((3, 3), at[0] * 3 + at[1], values), limit=3
    ),
    ("slice", ""): Case(((2, 5),), (1, 1, 4), lambda x: x[:, 1:4]),
    ("tile", ""): Case(((2, 3),), ((2, 3),), lambda x: torch.cat([torch.cat([x] * 3, 1)] * 2)),
}
ids = pytest.mark.parametrize("key", CASES, ids=lambda key: " ".join(key).strip())


def called(key):
    names = "PQ"[: len(CASES[key].shapes)]
    return al.Function(key[0], tuple(al.Param(each) for each in names), CASES[key].options), names


def values(ops, params, lead=0):
    # What makes numbers from nothing (eye) is of the type of a tensor of the adapter.
    like = torch.zeros(EXPERTS if lead else 1, 1, dtype=F64)
    if isinstance(ops, Eager):
        return Evaluator(ops, {**params, "like": like}, {}, lead=lead, task=TASK)
    return Evaluator(ops, params, {}, lead=lead, task=params.get("task"))


def test_every_function_is_lowered_and_tested():
    assert {name for name, _ in CASES} == set(LOWERINGS)
    assert set(FUNCTIONS) <= set(LOWERINGS)


@ids
def test_by_hand(key):
    matrix, names = called(key)
    tensors = CASES[key].tensors(0)
    got = values(Eager(), dict(zip(names, tensors, strict=True))).of(matrix)
    assert_close(got, CASES[key].reference(*tensors))
    if key[0] in FUNCTIONS:
        sizes = {name: tuple(each.shape) for name, each in zip(names, tensors, strict=True)}
        assert sizes_of(matrix, sizes, (1, 1)) == tuple(got.shape)


@ids
def test_as_nodes(key, lab):
    matrix, names = called(key)
    tensors = dict(zip(names, CASES[key].tensors(0), strict=True))
    hand = lab.hand()
    nodes = {name: hand.attribute(name, *each.shape, dtype=each.dtype) for name, each in tensors.items()}
    nodes["like"] = hand.attribute("like", 1, dtype=F64)
    more = {"task": TASK} if key[0] == "task" else {}
    nodes |= {name: hand.attribute(name, *each.shape, dtype=each.dtype) for name, each in more.items()}
    end = hand.call(torch.ops.aten.relu.default, nodes["like"])
    emit = Emit(hand.graph, end, Origin("test"), like=end)
    node = values(emit, nodes).of(matrix)
    got = lab.run(hand.done(node), {**tensors, **more, "like": torch.zeros(1, dtype=F64)})
    assert_close(got, CASES[key].reference(*tensors.values()))
    assert node.meta["val"].shape == got.shape
    assert node.meta["val"].dtype == got.dtype


SHARED = {"each its own": (), "first shared": (0,), "second shared": (1,)}
STACKS = [
    pytest.param(key, shared, id=f"{' '.join(key).strip()}-{label}")
    for key, case in CASES.items()
    for label, shared in SHARED.items()
    if all(each < len(case.shapes) for each in shared)
]


@pytest.mark.parametrize(("key", "shared"), STACKS)
def test_over_a_stack(key, shared):
    """Every expert gets what it would get alone; what is shared has one leading row."""
    matrix, names = called(key)
    experts = [CASES[key].tensors(each) for each in range(EXPERTS)]
    stacked = {}
    for place, name in enumerate(names):
        for each in experts:
            each[place] = experts[0][place] if place in shared else each[place]
        all_of_them = torch.stack([each[place] for each in experts])
        stacked[name] = all_of_them[:1] if place in shared else all_of_them
    got = values(Eager(), stacked, lead=1).of(matrix)
    for number, tensors in enumerate(experts):
        assert_close(got[min(number, len(got) - 1)], CASES[key].reference(*tensors))
    assert len(got) == (1 if len(shared) == len(names) else EXPERTS)


@pytest.mark.parametrize("lead", [0, 1])
def test_what_training_draws(lead):
    torch.manual_seed(0)
    coins, thinned = al.Function("coins", (), (4000, 0.3)), al.Function("thinned", (), (10, 4))

    def drawn():
        return Evaluator(Eager(), {"x": torch.zeros(1, dtype=torch.bfloat16)}, {}, lead=lead, training=True)

    evaluator = drawn()
    tossed = evaluator.of(coins)
    assert tossed.dtype == torch.bfloat16
    assert tossed.shape == (1,) * lead + (4000,)
    assert set(tossed.unique().tolist()) == {0.0, 1.0}
    assert abs(float(tossed.float().mean()) - 0.7) < 0.03
    assert evaluator.of(coins) is tossed
    assert not torch.equal(drawn().of(coins), tossed)
    places = torch.stack([drawn().of(thinned).flatten() for _ in range(200)]).float()
    assert (places.sum(1) == 6).all()
    assert ((places.mean(0) - 0.6).abs() < 0.15).all()


@pytest.mark.parametrize("lead", [0, 1])
def test_noise_makes_relaxed_bernoulli_draws(lead):
    logits = torch.randn((1,) * lead + (3, 4)) * 2
    noisy = al.Function("sigmoid", (al.Function("noisy", (al.Param("x"),)),))
    torch.manual_seed(7)
    drawn = Evaluator(Eager(), {"x": logits}, {}, lead=lead, training=True).of(noisy)
    torch.manual_seed(7)
    wanted = torch.distributions.RelaxedBernoulli(1.0, logits=logits).rsample()
    assert_close(drawn, wanted)
    assert not torch.equal(drawn, logits.sigmoid())
    assert torch.equal(Evaluator(Eager(), {"x": logits}, {}, lead=lead).of(noisy), logits.sigmoid())
