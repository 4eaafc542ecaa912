"""Closed forms: what the expressions of a method come to at one place, with values for its hyperparameters."""

from dataclasses import dataclass, field

from peftc.grammar.algebra import algebra
from peftc.grammar.algebra.functions import FUNCTIONS, MisfitError
from peftc.grammar.algebra.measure import sizes_of
from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.method.peft_item import names_in
from peftc.grammar.method.rule import PLACES, MethodRule, ParamRule, Value
from peftc.grammar.method.scalar import SCALAR_FUNCTIONS, evaluate
from peftc.grammar.source import Span
from peftc.grammar.syntax import expression, tree


@dataclass(frozen=True)
class Place:
    """What a rule needs to know of a site: its kind and sizes, and those of all sites of the adapter.

    `count` is the number of experts stacked in the weight; `largest` is (in, out) over all sites, `sites` their number,
    `total` the sum of their in * out and `sums` those of (in, out). `index` is the site's number among them, `before`
    the sums of (in, out) over those before it.
    """

    kind: str
    out_features: int
    in_features: int
    count: int = 1
    has_bias: bool = True
    largest: tuple[int, int] = (0, 0)
    sites: int = 1
    total: int = 0
    sums: tuple[int, int] = (0, 0)
    index: int = 0
    before: tuple[int, int] = (0, 0)
    category: str = ""  # what the site is in its block; sites of one category share
    members: int = 1
    tallest: int = 0
    kernel: int = 1  # how many numbers of each channel a convolution's kernel covers
    layers: int = 0  # of the model, `heads` of keys of each, in so many `stacks`: at a place that is no weight
    heads: int = 0
    stacks: int = 1
    name: str = field(default="", compare=False)

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def __str__(self) -> str:
        if self.name == f"@{self.kind}":  # a place that is the whole model's
            return f"the model's {self.kind}"
        return f"'{self.name}'" if self.name else "a weight"


@dataclass
class ClosedForms:
    """Evaluates the scalars and builds the closed forms of a rule at a place; `scope` has the hyperparameters' values.

    `scalars` collects the factors by name as they are met.
    """

    rule: MethodRule
    scope: dict[str, Value]
    span: Span | None
    place: Place
    anonymous: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    matrices: dict[str, algebra.Matrix] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lets = dict(self.rule.lets)
        self.present = {each.role: each for each in self.rule.params if self._exists(each)}
        self.taken = {*self.lets, *self.scope, *(each.role for each in self.rule.params)}

    def _exists(self, param: ParamRule) -> bool:
        return param.condition is None or bool(self.scalar(param.condition))

    # --- scalars ---

    def scalar(self, expr: tree.Expr) -> Value:
        """The value; lets are evaluated when first asked for."""
        for name in sorted(names_in(expr)):
            if name not in self.scope and name in self.lets:
                self.scope[name] = self.scalar(self.lets[name])
        return evaluate(expr, self.scope, self.span)

    def _factor(self, expr: tree.Expr | None, value: float) -> str:
        """The name of a scalar factor: its `let`, or the next free of c0, c1, ..."""
        name = expr.id if isinstance(expr, tree.Name) and expr.id in self.lets else ""
        while not name:
            candidate = f"c{self.anonymous}"
            self.anonymous += 1
            if candidate not in self.taken:
                name = candidate
        self.scalars[name] = value
        return name

    def _scaled(self, expr: tree.Expr, operand: algebra.Matrix, inverse: bool = False) -> algebra.Matrix:
        value = self.scalar(expr)
        assert isinstance(value, int | float)
        if not inverse:
            return algebra.Scaled(self._factor(expr, float(value)), operand)
        if value == 0:
            fail(SpecError, "E213", f"'{expression.text(expr)}' is zero, and divides", self.span or expr.span)
        return algebra.Scaled(self._factor(None, 1 / value), operand)

    # --- matrices ---

    def is_matrix(self, expr: tree.Expr) -> bool:
        """Whether the checked expression is a matrix; what it is built from decides."""
        match expr:
            case tree.Name(name):
                if name in self.lets:
                    return self.is_matrix(self.lets[name])
                return name in ("W", "Ws", "b") or any(each.role == name for each in self.rule.params)
            case tree.Transpose():
                return True
            case tree.Call(function, arguments):
                if function in SCALAR_FUNCTIONS:
                    return self.is_matrix(arguments[0].value)
                return True
            case tree.Unary(_, operand):
                return self.is_matrix(operand)
            case tree.Conditional(then, _, _):
                return self.is_matrix(then)
            case tree.Binary(_, left, right):
                return self.is_matrix(left) or self.is_matrix(right)
            case _:
                return False

    def matrix(self, expr: tree.Expr) -> algebra.Matrix:
        """The closed form of a matrix expression."""
        match expr:
            case tree.Name("W"):
                return algebra.Weight()
            case tree.Name("b"):
                return algebra.Bias()
            case tree.Name("Ws"):
                return algebra.Weights(self.place.members, max(self.place.out_features, self.place.tallest))
            case tree.Name(name) if name in self.lets:
                if name not in self.matrices:
                    self.matrices[name] = self.matrix(self.lets[name])
                return self.matrices[name]
            case tree.Name(name):
                if name not in self.present:
                    message = f"'{name}' is used at {self.place}, where its condition does not hold"
                    fail(SpecError, "E217", message, self.span or expr.span)
                return algebra.Param(name)
            case tree.Transpose(operand):
                return algebra.Transposed(self.matrix(operand))
            case tree.Conditional(then, test, otherwise):
                return self.matrix(then) if self.scalar(test) else self.matrix(otherwise)
            case tree.Unary(_, operand):
                return self._minus(self.matrix(operand))
            case tree.Call("drop", (operand, p)):
                return self._dropped(self.matrix(operand.value), p.value)
            case tree.Call(function, arguments):
                return self._function(function, [each.value for each in arguments])
            case tree.Binary("@", left, right):
                return algebra.Product(self.matrix(left), self.matrix(right))
            case tree.Binary(operator, left, right) if not self.is_matrix(right):
                return self._with_number(operator, self.matrix(left), right)
            case tree.Binary(operator, left, right) if not self.is_matrix(left):
                return self._number_with(operator, left, self.matrix(right))
            case tree.Binary("+", left, right):
                return algebra.Sum(self.matrix(left), self.matrix(right))
            case tree.Binary("-", left, right):
                return algebra.Sum(self.matrix(left), self._minus(self.matrix(right)))
            case tree.Binary("*", left, right):
                return algebra.Hadamard(self.matrix(left), self.matrix(right))
            case tree.Binary("/", left, right):
                return algebra.Function("divide", (self.matrix(left), self.matrix(right)))
            case _:
                raise AssertionError(f"not a tensor: {expr}")

    def _with_number(self, operator: str, left: algebra.Matrix, right: tree.Expr) -> algebra.Matrix:
        if operator in ("*", "/"):
            return self._scaled(right, left, inverse=operator == "/")
        return algebra.Function("shift", (left,), (self._real(right) * (1 if operator == "+" else -1),))

    def _number_with(self, operator: str, left: tree.Expr, right: algebra.Matrix) -> algebra.Matrix:
        match operator:
            case "*":
                return self._scaled(left, right)
            case "/":
                return self._scaled(left, algebra.Function("reciprocal", (right,)))
            case _:
                return algebra.Function(
                    "shift", (right if operator == "+" else self._minus(right),), (self._real(left),)
                )

    def _function(self, name: str, given: list[tree.Expr]) -> algebra.Matrix:
        function = FUNCTIONS[name]
        operands = tuple(self.matrix(each) for each in given[: function.operands])
        options: list[algebra.Option] = []
        for (_, kind), value in zip(function.options, given[function.operands :], strict=True):
            if kind == "sizes":
                assert isinstance(value, tree.Sequence)
                options.append(tuple(self._whole(each) for each in value.items))
            elif kind == "text":
                options.append(str(self.scalar(value)))
            else:
                options.append(self._whole(value) if kind == "int" else self._real(value))
        return algebra.Function(name, operands, tuple(options))

    def _whole(self, expr: tree.Expr) -> int:
        value = self.scalar(expr)
        assert isinstance(value, int), value
        return value

    def _real(self, expr: tree.Expr) -> float:
        value = self.scalar(expr)
        assert isinstance(value, int | float), value
        return float(value)

    def _known_bias(self, expr: tree.Expr, place: tree.Expr) -> algebra.Matrix:
        """The closed form of what may use `b`; where the module has none, it is zero."""
        found = self._without_bias(self.matrix(expr), place)
        if found is None:
            message = f"'{expression.text(place)}' is nothing at {self.place}, which has no bias"
            fail(SpecError, "E217", message, self.span or place.span)
        return found

    def _without_bias(self, matrix: algebra.Matrix, place: tree.Expr) -> algebra.Matrix | None:
        """The matrix with `b` = 0 where the module has none; None where nothing is left."""
        return matrix if self.place.has_bias else algebra.without_bias(self.over_bias(matrix, place))

    def over_bias(self, matrix: algebra.Matrix, place: tree.Expr) -> algebra.Matrix:
        """The matrix in a form in which `b` may be left out. Raises E217 for a function of what has to be there."""
        if self.place.has_bias or not any(isinstance(each, algebra.Bias) for each in algebra.walk(matrix)):
            return matrix
        made = algebra.rebuild(matrix, lambda each: self.over_bias(each, place))
        rests = [algebra.without_bias(each) for each in algebra.children(made)]
        match made:
            case algebra.Sum(left, right) if None in rests and rests != [None, None]:
                kept = [
                    each if rest is None else self._as_large(each, matrix)
                    for each, rest in zip((left, right), rests, strict=True)
                ]
                return algebra.Sum(*kept)
            case algebra.Function(name, _) if None in rests and name not in ("reshape", "permute", "slice", "tile"):
                message = f"'{self.rule.name}' needs a bias, and {self.place} has none"
                fail(SpecError, "E217", message, self.span or place.span)
            case _:
                return made

    def _as_large(self, rest: algebra.Matrix, whole: algebra.Matrix) -> algebra.Matrix:
        """What is left of a sum, repeated where it was stretched to the other side's size."""
        try:
            own, wanted = (sizes_of(each, self.shapes, self.place.sizes) for each in (rest, whole))
        except MisfitError:
            return rest  # measuring the whole says what is wrong
        if own == wanted:
            return rest
        flat = (1,) * (len(wanted) - len(own)) + own
        counts = tuple(size // each for size, each in zip(wanted, flat, strict=True))
        return algebra.Function("tile", (algebra.Function("reshape", (rest,), (flat,)),), (counts,))

    def _minus(self, operand: algebra.Matrix) -> algebra.Matrix:
        return algebra.Scaled(self._factor(None, -1.0), operand)

    def _dropped(self, operand: algebra.Matrix, p: tree.Expr) -> algebra.Matrix:
        value = self.scalar(p)
        assert isinstance(value, int | float)
        if not 0 <= value < 1:
            message = f"{expression.text(p)} = {value:g} is no dropout; it must be at least 0 and less than 1"
            fail(SpecError, "E212", message, self.span or p.span)
        if value == 0:
            return operand
        if self.place.kind == "parameter":
            message = f"{expression.text(p)} = {value:g}: a raw parameter has no input of its own to drop from"
            fail(SpecError, "E212", message, self.span or p.span, help="use no dropout there")
        if self.place.kind in PLACES:
            message = f"{expression.text(p)} = {value:g}: what is put in front has no input to drop from"
            fail(SpecError, "E212", message, self.span or p.span, help="use no dropout there")
        return algebra.Dropped(operand, float(value))
