"""Draws methods: expressions over W, b, parameters and the functions of tensors that type-check by construction."""

import re
from dataclasses import dataclass, field

from hypothesis import strategies as st

FLAGS = {"r": "int", "n": "int", "s": "float", "f": "bool"}
NUMBERS = ("s", "0.5", "2", "-1", "(s / r)")
ELEMENTWISE = ("relu", "tanh", "sigmoid", "silu", "gelu", "cos", "sin", "abs", "sign", "stop_gradient", "softmax")


@dataclass(frozen=True)
class Size:
    """A size as it is written, and its value at the site."""

    text: str
    value: int

    def __mul__(self, other: "Size") -> "Size":
        return Size(f"{self.text} * {other.text}", self.value * other.value)

    def __add__(self, number: int) -> "Size":
        return Size(f"{self.text} + {number}", self.value + number)


ONE = Size("1", 1)
Sizes = tuple[Size, ...]


def listed(sizes: Sizes) -> str:
    return ", ".join(each.text for each in sizes)


@dataclass
class Writer:
    """Writes one method. `n` divides `out` and `in`."""

    draw: st.DrawFn
    out: int
    columns: int
    n: int
    r: int
    items: list[str] = field(default_factory=list)
    known: dict[str, list[str]] = field(default_factory=dict)  # the names of a shape, as it is written
    count: int = 0

    def __post_init__(self) -> None:
        self.rows, self.width = Size("out", self.out), Size("in", self.columns)
        self.rank, self.part = Size("r", self.r), Size("n", self.n)
        self.slices = {
            "out": Size("(out // n)", self.out // self.n),
            "in": Size("(in // n)", self.columns // self.n),
        }

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def leaf(self, sizes: Sizes) -> str:
        known = self.known.setdefault(listed(sizes), [])
        match [each.text for each in sizes]:
            case ["out", "in"]:
                known = [*known, "W"]
            case ["in", "out"]:
                known = [*known, "W.T"]
            case ["out"]:
                known = [*known, "b"] if self.has_bias else known
            case _:
                pass
        if known and self.draw(st.booleans()):
            return self.one_of(*known)
        return self.param(sizes)

    has_bias = False

    def param(self, sizes: Sizes) -> str:
        name = self.name("P")
        self.items.append(f'param {name}[{listed(sizes)}] = ones saved "{name}"')
        self.known.setdefault(listed(sizes), []).append(name)
        return name

    def index(self, count: Size, limit: str) -> str:
        name = self.name("I")
        self.items.append(f'const {name}[{count.text}] = randperm({limit}) saved "{name}"')
        return name

    def tensor(self, sizes: Sizes, depth: int) -> str:
        """An expression of these sizes."""
        if depth <= 0:
            return self.leaf(sizes)
        ways = ["leaf", "sum", "sum", "scale", "times", "elementwise", "shift", "divide", "choice", "let", "moved"]
        if len(sizes) >= 2:
            ways += ["product", "product", "product", "transposed", "dropped", "mixed"]
        if len(sizes) == 2:
            ways += ["matrix", "matrix", "matrix", "scattered"]
        if any(each == ONE for each in sizes):
            ways += ["reduced"]
        way = self.one_of(*ways)
        return getattr(self, f"_{way}")(sizes, depth - 1)

    def _leaf(self, sizes: Sizes, depth: int) -> str:
        return self.leaf(sizes)

    def _sum(self, sizes: Sizes, depth: int) -> str:
        left, right = self.tensor(sizes, depth), self.tensor(self.stretched(sizes), depth)
        return f"({left} {self.one_of('+', '-')} {right})" if self.draw(st.booleans()) else f"({right} + {left})"

    def stretched(self, sizes: Sizes) -> Sizes:
        """Sizes that broadcast to these: some of them one, or leading ones left out."""
        if self.draw(st.booleans()):
            return sizes
        kept = tuple(self.one_of(each, ONE) for each in sizes)
        return kept[self.draw(st.integers(0, len(sizes) - 1)) :]

    def _times(self, sizes: Sizes, depth: int) -> str:
        parts = [self.tensor(sizes, depth), self.tensor(self.stretched(sizes), depth)]
        return f"({' * '.join(self.draw(st.permutations(parts)))})"

    def _scale(self, sizes: Sizes, depth: int) -> str:
        inner, number = self.tensor(sizes, depth), self.one_of(*NUMBERS)
        return self.one_of(f"({number} * {inner})", f"({inner} * ({number}))", f"({inner} / (s + 3))", f"(-{inner})")

    def _shift(self, sizes: Sizes, depth: int) -> str:
        inner = self.tensor(sizes, depth)
        return self.one_of(f"({inner} + 0.5)", f"(s - {inner})", f"({inner} - s)", f"(1 + {inner})")

    def _divide(self, sizes: Sizes, depth: int) -> str:
        if self.draw(st.booleans()):
            above, below = self.tensor(sizes, depth), self.leaf(self.stretched(sizes))
        else:
            above, below = self.one_of("2", "s"), self.leaf(sizes)
        return f"({above} / {self.one_of(f'(2 + tanh({below}))', f'sqrt(1 + {below} * {below})')})"

    def _elementwise(self, sizes: Sizes, depth: int) -> str:
        inner = self.tensor(sizes, depth)
        return self.one_of(
            *(f"{each}({inner})" for each in ELEMENTWISE),
            f"exp(tanh({inner}))",
            f"clamp({inner}, -0.5, s)",
            f"softmax(topk({inner}, 1))",
            f'activation({inner}, "mish")',
        )

    def _choice(self, sizes: Sizes, depth: int) -> str:
        return f"({self.tensor(sizes, depth)} if {self.one_of('f', 'r > 2')} else {self.tensor(sizes, 0)})"

    def _let(self, sizes: Sizes, depth: int) -> str:
        value, name = self.tensor(sizes, depth), self.name("L")
        self.items.append(f"let {name} = {value}")
        self.known.setdefault(listed(sizes), []).append(name)
        return name

    def _moved(self, sizes: Sizes, depth: int) -> str:
        axis = self.draw(st.integers(0, len(sizes) - 1))
        size, rest = sizes[axis], lambda new: (*sizes[:axis], new, *sizes[axis + 1 :])
        match self.one_of("roll", "cycle", "slice", "concat", "gather", "reshape", "tile"):
            case "roll":
                return f"roll({self.tensor(sizes, depth)}, {self.one_of(1, 'r')}, {axis})"
            case "cycle":
                return f"cycle({self.tensor(rest(self.rank), depth)}, {size.text}, {axis})"
            case "slice":
                return f"slice({self.tensor(rest(size + 2), depth)}, {axis}, 1, 1 + {size.text})"
            case "concat" if size.value > 1:
                less = Size(f"{size.text} - 1", size.value - 1)
                left, right = self.tensor(rest(ONE), depth), self.tensor(rest(less), depth)
                return f"concat({left}, {right}, {axis})"
            case "gather" if axis == 0:
                index = self.index(size, f"{size.text} + 2")
                return f"gather({self.tensor(rest(size + 2), depth)}, {index})"
            case "tile" if size.text in self.slices and self.n > 1:
                counts = ", ".join("n" if place == axis else "1" for place in range(len(sizes)))
                return f"tile({self.tensor(rest(self.slices[size.text]), depth)}, [{counts}])"
            case _:
                turned = tuple(self.draw(st.permutations(sizes)))
                return f"reshape({self.tensor(turned, depth)}, [{listed(sizes)}])"

    def _reduced(self, sizes: Sizes, depth: int) -> str:
        axis = sizes.index(ONE)
        inner = self.tensor((*sizes[:axis], self.one_of(self.rank, self.width), *sizes[axis + 1 :]), depth)
        return f"{self.one_of('sum', 'mean', 'norm')}({inner}, {axis})"

    def _product(self, sizes: Sizes, depth: int) -> str:
        inner = self.one_of(self.rank, self.rows, self.width, ONE)
        lead = sizes[:-2] if self.draw(st.booleans()) else ()
        left, right = self.tensor((*sizes[:-1], inner), depth), self.tensor((*lead, inner, sizes[-1]), depth)
        return f"({left} @ {right})"

    def _transposed(self, sizes: Sizes, depth: int) -> str:
        return f"({self.tensor((*sizes[:-2], sizes[-1], sizes[-2]), depth)}).T"

    def _dropped(self, sizes: Sizes, depth: int) -> str:
        return f"drop({self.tensor(sizes, depth)}, 0.25)"

    def _mixed(self, sizes: Sizes, depth: int) -> str:
        axes = self.draw(st.permutations(range(len(sizes))))
        before = tuple(sizes[axes.index(each)] for each in range(len(sizes)))
        return f"permute({self.tensor(before, depth)}, [{', '.join(map(str, axes))}])"

    def _scattered(self, sizes: Sizes, depth: int) -> str:
        index = self.index(self.part, sizes[0].text)
        return f"scatter({self.tensor((self.part,), depth)}, {index}, [{listed(sizes)}])"

    def _matrix(self, sizes: Sizes, depth: int) -> str:
        rows, columns = sizes
        ways = ["kron", "kron", "outer"]
        if rows == columns:
            ways += ["diag", "eye", "cayley", "circulant", "inverse", "expm", "neumann", "skew"]
        if {rows.text, columns.text} <= set(self.slices):
            ways += ["block_diag", "blocks", "block_diag", "blocks"]
        if sizes == (self.rows, self.width):
            ways += ["singular"]
        small = tuple(self.slices.get(each.text, each) for each in sizes)
        few = tuple(self.part if each.text in self.slices else ONE for each in sizes)
        match self.one_of(*ways):
            case "kron":
                first, second = self.draw(st.permutations((few, small)))
                return f"kron({self.tensor(first, depth)}, {self.tensor(second, depth)})"
            case "outer":
                return f"({self.tensor((rows, ONE), depth)} * {self.tensor((columns,), depth)})"
            case "diag":
                return f"diag({self.tensor((rows,), depth)})"
            case "eye":
                return f"eye({rows.text})"
            case "circulant":
                return f"circulant({self.tensor((rows,), depth)})"
            case "skew":
                pairs = Size(f"{rows.text} * ({rows.text} - 1) // 2", rows.value * (rows.value - 1) // 2)
                return f"skew({self.param((pairs,))}, {rows.text})" if pairs.value else f"eye({rows.text})"
            case "block_diag":
                return f"block_diag({self.tensor((self.part, *small), depth)})"
            case "blocks":
                return f"blocks({self.tensor((self.part, self.part, *small), depth)})"
            case "singular":
                left, values, right = (f"{each}_singular(W, 1)" for each in ("left", "", "right"))
                return f"({left} * {values.strip('_').replace('singular', 'singular_values')} @ {right})"
            case square:
                # Far from where they cannot be computed: I + X with X antisymmetric, or X with a small norm.
                name = self.param(sizes)
                inner = f"({name} - {name}.T)" if square in ("cayley", "inverse") else f"(0.25 * tanh({name}))"
                inner = f"eye({rows.text}) + {inner}" if square == "inverse" else inner
                return f"{square}({inner}{', 3' if square == 'neumann' else ''})"

    def method(self, depth: int) -> str:
        weight = self.tensor((self.rows, self.width), depth)
        primes = f"W' = {self.one_of(weight, f'W + {weight}', f'W + s * {weight}')}"
        if self.draw(st.booleans()):
            self.has_bias = True
            primes += f" b' = {self.tensor((self.rows,), depth - 1)}"
        body = " ".join((*self.items, primes))
        words = set(re.findall(r"\w+", body))
        values = {"r": self.r, "n": self.n, "s": "0.75", "f": self.one_of("true", "false")}
        head = ", ".join(f"{name}: {kind} = {values[name]}" for name, kind in FLAGS.items() if name in words)
        return f"method m({head}) {{ on linear {body} }}"


@st.composite
def methods(draw: st.DrawFn, out: int, columns: int) -> str:
    """The text of a method for a weight of this size."""
    n = draw(st.sampled_from([each for each in (1, 2, 3) if out % each == columns % each == 0]))
    return Writer(draw, out, columns, n, draw(st.integers(1, min(out, columns, 3)))).method(draw(st.integers(1, 4)))
