"""Values for a rule: a spec's arguments evaluated, and a rule's closed form at one site."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from peftc.grammar import algebra, expression, tree
from peftc.grammar.check import INITIALISERS, match_arguments
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.infer import Scalar, type_of
from peftc.grammar.rule import BoundParam, BoundRule, Init, MethodRule, ParamRule, Value
from peftc.grammar.scalar import evaluate
from peftc.grammar.source import Span
from peftc.grammar.spec import Values

MAX_ELEMENTS = 2**31


def complete(rule: MethodRule, arguments: tuple[tree.Argument, ...]) -> Values:
    """A value for every hyperparameter, in the rule's order: the given one or the default. Raises SpecError (E14x)."""
    given = dict(partial(rule, arguments))
    return tuple(
        (each.name, given[each.name] if each.name in given else _convert(each, _literal(each.default), each.default))
        for each in rule.hyperparameters
    )


def partial(rule: MethodRule, arguments: tuple[tree.Argument, ...]) -> Values:
    """The values of the arguments given, as a `with` clause needs them. Raises SpecError (E14x)."""
    known = {each.name: each for each in rule.hyperparameters}
    values: dict[str, Value] = {}
    for argument in arguments:
        if argument.name is None:
            example = next(iter(known), "")
            help = f"as in {example} = {expression.text(argument.value)}" if example else f"'{rule.name}' takes none"
            fail(SpecError, "E141", f"the arguments of '{rule.name}' are given by name", argument.span, help=help)
        if argument.name not in known:
            listed = f"'{rule.name}' takes {', '.join(known)}" if known else f"'{rule.name}' takes none"
            help = did_you_mean(argument.name, known) or listed
            fail(SpecError, "E141", f"'{rule.name}' has no hyperparameter '{argument.name}'", argument.span, help=help)
        if argument.name in values:
            fail(SpecError, "E143", f"'{argument.name}' is given twice", argument.span)
        hyperparameter = known[argument.name]
        values[argument.name] = _convert(hyperparameter, _literal(argument.value), argument.value)
    return tuple(values.items())


def _literal(expr: tree.Expr) -> Value:
    if isinstance(expr, tree.Null):
        return None
    if isinstance(expr, tree.Name):
        help = "a value is a number, true, false, none or a text in double quotes"
        fail(SpecError, "E142", f"'{expr.id}' is not a value", expr.span, help=help)
    found = type_of(expr, {})
    if not isinstance(found, Scalar):
        fail(SpecError, "E142", "this is not a value", expr.span)
    return evaluate(expr, {})


def _convert(hyperparameter: tree.Hyperparameter, value: Value, place: tree.Expr) -> Value:
    wanted, name = hyperparameter.type, hyperparameter.name
    match value, wanted:
        case None, _ if isinstance(hyperparameter.default, tree.Null):
            return None
        case bool(), "bool":
            return value
        case bool(), _:
            pass
        case int() | float(), "float":
            return float(value)
        case int(), "int":
            return value
        case float(), "int" if value.is_integer():
            return int(value)
        case str(), "text":
            if not hyperparameter.choices or value in hyperparameter.choices:
                return value
            listed = ", ".join(map(expression.quoted, hyperparameter.choices))
            help = did_you_mean(value, hyperparameter.choices) or f"it is one of {listed}"
            fail(SpecError, "E142", f"{expression.quoted(value)} is not a choice for '{name}'", place.span, help=help)
        case _:
            pass
    written = expression.text(expression.literal(value))
    fail(SpecError, "E142", f"'{name}' is {Scalar(wanted)}, and {written} is not", place.span)


def bind(
    rule: MethodRule,
    values: Values,
    *,
    out_features: int,
    in_features: int,
    kind: str,
    count: int = 1,
    span: Span | None = None,
    strict: bool = True,
    site: str = "",
) -> BoundRule:
    """The rule's closed form for a `[out, in]` weight of a kind (for a stack of experts: of each of `count`).

    The tree depends on the hyperparameters' *values* only through conditionals and dropout: every scalar factor is a
    name, so adapters that differ in a factor have equal trees. `strict` refuses a rank above the weight's own;
    `site` is what messages call it. Raises SpecError (E21x).
    """
    if kind not in rule.kinds:
        message = f"'{rule.name}' does not fit {_at(site)} of kind '{kind}'; it fits {', '.join(rule.kinds)}"
        fail(SpecError, "E214", message, span)
    for name, value in values:
        if isinstance(value, float) and not math.isfinite(value):
            fail(SpecError, "E213", f"{name} = {value} is not a finite number", span)
    scope: dict[str, Value] = {**dict(values), "in": in_features, "out": out_features}
    binder = _Binder(rule, scope, span, kind)
    if strict:
        _check_rank(rule, scope, span, site)
    params = tuple(binder.param(each, count, site) for each in rule.params)
    weight = binder.matrix(rule.weight)
    return BoundRule(rule, values, weight, tuple(binder.scalars.items()), params)


def _check_rank(rule: MethodRule, scope: Mapping[str, Value], span: Span | None, site: str) -> None:
    hyperparameters = {each.name for each in rule.hyperparameters}
    rows, columns = scope["out"], scope["in"]
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    for param in rule.params:
        names = [each.id for each in param.shape if isinstance(each, tree.Name)]
        if not {"in", "out"} & set(names):
            continue
        for name in names:
            size = scope.get(name)
            if name in hyperparameters and isinstance(size, int) and size > min(rows, columns):
                message = f"{name} = {size} is more than {_at(site)} of size {rows} x {columns} can use"
                help = f"at most {min(rows, columns)} is of use here"
                fail(SpecError, "E211", message, span, help=help)


def _at(site: str) -> str:
    return f"'{site}'" if site else "a weight"


@dataclass
class _Binder:
    rule: MethodRule
    scope: dict[str, Value]
    span: Span | None
    kind: str
    anonymous: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    matrices: dict[str, algebra.Matrix] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lets = dict(self.rule.lets)
        self.taken = {*self.lets, *self.scope, *(each.role for each in self.rule.params)}

    # --- parameters ---

    def param(self, param: ParamRule, count: int, site: str) -> BoundParam:
        shape: list[int] = []
        for expr in param.shape:
            size = self.scalar(expr)
            assert isinstance(size, int), size
            written = expression.text(expr)
            if size < 1:
                message = f"{written} = {size} leaves the parameter '{param.role}' empty; it must be at least 1"
                fail(SpecError, "E210", message, self.span or expr.span)
            shape.append(size)
        if count > 1:
            self._stack(param, shape, count)
        if math.prod(shape) > MAX_ELEMENTS:
            sizes = " x ".join(map(str, shape))
            message = f"the parameter '{param.role}' of {_at(site)} would be {sizes}, more than 2^31 numbers"
            fail(SpecError, "E210", message, self.span or param.shape[0].span)
        init = dict(param.init)
        found = self._init(init.get(self.kind, init[""]))
        return BoundParam(param.role, (shape[0], shape[1]), found, param.saved_for(self.kind))

    def _stack(self, param: ParamRule, shape: list[int], count: int) -> None:
        """All experts' parameters lie in one matrix, side by side along the size that is the method's own."""
        sides = (tree.Name("in"), tree.Name("out"))
        own = [index for index, each in enumerate(param.shape) if each not in sides]
        if len(own) != 1:
            written = ", ".join(expression.text(each) for each in param.shape)
            message = f"'{self.rule.name}' does not fit a stack of experts: '{param.role}' is [{written}]"
            help = "there a parameter has one size that is 'in' or 'out', and one of the method's own"
            fail(SpecError, "E215", message, self.span, help=help)
        shape[own[0]] *= count

    def _init(self, expr: tree.Expr) -> Init:
        name = expr.id if isinstance(expr, tree.Name) else expr.function if isinstance(expr, tree.Call) else ""
        given = match_arguments(expr)
        arguments: list[tuple[str, float]] = []
        for argument, default in INITIALISERS[name]:
            value = self.scalar(given[argument]) if argument in given else default
            assert isinstance(value, int | float), value
            arguments.append((argument, float(value)))
        return Init(name, tuple(arguments))

    # --- scalars ---

    def scalar(self, expr: tree.Expr) -> Value:
        """The value; lets are evaluated when first asked for."""
        for name in _names(expr):
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
                return name == "W" or any(each.role == name for each in self.rule.params)
            case tree.Transpose():
                return True
            case tree.Call(function, _):
                return function == "drop"
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
            case tree.Name(name) if name in self.lets:
                if name not in self.matrices:
                    self.matrices[name] = self.matrix(self.lets[name])
                return self.matrices[name]
            case tree.Name(name):
                return algebra.Param(name)
            case tree.Transpose(operand):
                return algebra.Transposed(self.matrix(operand))
            case tree.Conditional(then, test, otherwise):
                return self.matrix(then) if self.scalar(test) else self.matrix(otherwise)
            case tree.Unary(_, operand):
                return self._minus(self.matrix(operand))
            case tree.Call(_, (operand, p)):
                return self._dropped(self.matrix(operand.value), p.value)
            case tree.Binary("+", left, right):
                return algebra.Sum(self.matrix(left), self.matrix(right))
            case tree.Binary("-", left, right):
                return algebra.Sum(self.matrix(left), self._minus(self.matrix(right)))
            case tree.Binary("@", left, right):
                return algebra.Product(self.matrix(left), self.matrix(right))
            case tree.Binary("/", left, right):
                return self._scaled(right, self.matrix(left), inverse=True)
            case tree.Binary("*", left, right):
                if not self.is_matrix(left):
                    return self._scaled(left, self.matrix(right))
                if not self.is_matrix(right):
                    return self._scaled(right, self.matrix(left))
                return algebra.Hadamard(self.matrix(left), self.matrix(right))
            case _:
                raise AssertionError(f"not a matrix: {expr}")

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
        if self.kind == "parameter":
            message = f"{expression.text(p)} = {value:g}: a raw parameter has no input of its own to drop from"
            fail(SpecError, "E212", message, self.span or p.span, help="use no dropout there")
        return algebra.Dropped(operand, float(value))


def _names(expr: tree.Expr) -> tuple[str, ...]:
    match expr:
        case tree.Name(name):
            return (name,)
        case tree.Call(_, arguments):
            return tuple(name for each in arguments for name in _names(each.value))
        case tree.Unary(_, operand):
            return _names(operand)
        case tree.Binary(_, left, right):
            return _names(left) + _names(right)
        case tree.Conditional(then, test, otherwise):
            return _names(then) + _names(test) + _names(otherwise)
        case _:
            return ()
