"""A method definition, checked: from tree to rule. Everything that can be known before a model is, is known here."""

import re
from collections.abc import Mapping, Sequence

from peftc.grammar import expression, tree
from peftc.grammar.build_expression import MAX_DEPTH
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.infer import BOOL, Scalar, Type, need, type_of, unknown_name
from peftc.grammar.infer import number as need_number
from peftc.grammar.rule import KINDS, MethodRule, ParamRule
from peftc.grammar.shapes import Dim, Shape
from peftc.grammar.source import Span

# Arguments of the initialisers with their defaults; None means it must be given.
INITIALISERS: Mapping[str, tuple[tuple[str, float | None], ...]] = {
    "zeros": (),
    "ones": (),
    "constant": (("value", None),),
    "normal": (("mean", 0.0), ("std", 1.0)),
    "uniform": (("low", None), ("high", None)),
    "kaiming_uniform": (("a", 0.0),),
    "xavier_uniform": (),
}

_RESERVED = (
    "in",
    "out",
    "W",
    "b",
    "if",
    "else",
    "not",
    "and",
    "or",
    "true",
    "false",
    "none",
    "drop",
    "sqrt",
    "min",
    "max",
)
MAX_NODES = 2000

_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def check_method(method: tree.Method) -> MethodRule:
    """The rule a definition stands for. Raises SpecError (E13x) at the first thing wrong with it."""
    return _Checker(method).rule()


class _Checker:
    def __init__(self, method: tree.Method):
        self.method = method
        self.names: dict[str, Type] = {}
        self.places: dict[str, Span | None] = {}
        self.used: set[str] = set()
        self.params: list[ParamRule] = []
        self.lets: list[tuple[str, tree.Expr]] = []
        self.defaults: dict[str, tuple[str, ...]] = {}
        self.extents: dict[str, tuple[int, int]] = {}
        self.weight: tree.Expr | None = None
        self.peft: tree.PeftItem | None = None

    def rule(self) -> MethodRule:
        method = self.method
        for each in method.hyperparameters:
            self._hyperparameter(each)
        size_in, size_out = Dim.atom("in"), Dim.atom("out")
        self.names |= {"in": Scalar("int", dim=size_in), "out": Scalar("int", dim=size_out)}
        self.names["W"] = Shape(size_out, size_in)
        kinds = self._kinds()
        for item in method.items:
            match item:
                case tree.ParamItem():
                    self._param(item, kinds)
                case tree.LetItem():
                    self._define(item.name, self._type(item.value), item)
                    self.extents[item.name] = self._extent(item.value)
                    self.lets.append((item.name, item.value))
                case tree.DefaultItem():
                    self._default(item)
                case tree.PrimeItem():
                    self._prime(item)
                case tree.PeftItem():
                    self._peft(item)
                case _:
                    pass
        if self.weight is None:
            help = "say what the adapted weight is: W' = W + ..."
            fail(SpecError, "E135", f"the method '{method.name}' does not define W'", _head(method), help=help)
        self._all_used()
        self._keys_differ(kinds)
        return MethodRule(
            name=method.name,
            hyperparameters=method.hyperparameters,
            kinds=kinds,
            params=tuple(self.params),
            lets=tuple(self.lets),
            weight=self.weight,
            defaults=tuple(self.defaults.items()),
            peft_type=self.peft.type if self.peft else "",
            peft_fields=tuple((each.name, each.value) for each in self.peft.fields) if self.peft else (),
            doc=method.doc,
            span=method.span,
        )

    # --- names ---

    def _type(self, expr: tree.Expr) -> Type:
        return type_of(expr, self.names, self.used)

    def _define(self, name: str, type: Type, node: tree.Node) -> None:
        if name in _RESERVED:
            fail(SpecError, "E131", f"'{name}' is a word of the language and cannot be a name", node.span)
        if name in self.names:
            place = self.places.get(name)
            help = f"it is defined in line {place.line}" if place is not None else ""
            fail(SpecError, "E131", f"'{name}' is defined twice", node.span, help=help)
        self.names[name] = type
        self.places[name] = node.span

    def _hyperparameter(self, item: tree.Hyperparameter) -> None:
        if item.choices and item.type != "text":
            fail(SpecError, "E132", f"only a text has choices, and '{item.name}' is of type {item.type}", item.span)
        if len(set(item.choices)) != len(item.choices):
            fail(SpecError, "E131", f"'{item.name}' names a choice twice", item.span)
        default, optional = item.default, isinstance(item.default, tree.Null)
        if not optional:
            found = type_of(default, {})
            need(default, found, Scalar(item.type), f"'{item.name}: {item.type}'")
            if isinstance(default, tree.Text) and item.choices and default.value not in item.choices:
                help = f"it is one of {', '.join(map(expression.quoted, item.choices))}"
                fail(SpecError, "E132", f"the default of '{item.name}' is not a choice", default.span, help=help)
        dim = Dim.atom(item.name) if item.type == "int" and not optional else None
        self._define(item.name, Scalar(item.type, optional, item.choices, dim), item)

    def _all_used(self) -> None:
        reached = self._reached()
        for param in self.params:
            if param.role not in reached:
                help = "a parameter that W' does not depend on would never be trained"
                fail(
                    SpecError, "E134", f"the parameter '{param.role}' is never used", self.places[param.role], help=help
                )
        for name, _ in self.lets:
            if name not in self.used:
                fail(SpecError, "E134", f"'let {name}' is never used", self.places[name])
        for each in self.method.hyperparameters:
            if each.name not in self.used:
                fail(SpecError, "E134", f"the hyperparameter '{each.name}' is never used", each.span)

    def _reached(self) -> set[str]:
        """The names W' depends on, through lets too."""
        assert self.weight is not None
        reached: set[str] = set()
        waiting: list[tree.Expr] = [self.weight]
        lets = dict(self.lets)
        while waiting:
            names: set[str] = set()
            type_of(waiting.pop(), self.names, names)
            waiting += [lets[each] for each in names - reached if each in lets]
            reached |= names
        return reached

    # --- items ---

    def _kinds(self) -> tuple[str, ...]:
        for item in self.method.items:
            if isinstance(item, tree.KindsItem):
                for kind in item.kinds:
                    _known_kind(kind, item)
                if len(set(item.kinds)) != len(item.kinds):
                    fail(SpecError, "E131", "a kind is named twice", item.span)
                return item.kinds
        help = f"begin with 'on' and some of: {', '.join(KINDS)}"
        message = f"the method '{self.method.name}' does not say which kinds of module it fits"
        fail(SpecError, "E139", message, _head(self.method), help=help)

    def _default(self, item: tree.DefaultItem) -> None:
        for each in item.architectures:
            if each in self.defaults:
                fail(SpecError, "E131", f"'{each}' already has default targets", item.span)
            self.defaults[each] = item.targets

    def _param(self, item: tree.ParamItem, kinds: Sequence[str]) -> None:
        if len(item.shape) != 2:
            fail(
                SpecError,
                "E133",
                f"a parameter is a matrix of two sizes; '{item.name}' has {len(item.shape)}",
                item.span,
            )
        dims: list[Dim] = []
        for each in item.shape:
            found = self._type(each)
            if not isinstance(found, Scalar) or found.kind != "int" or found.optional:
                what = f"a matrix {found}" if isinstance(found, Shape) else str(found)
                message = f"a size is a whole number, and '{expression.text(each)}' is {what}"
                fail(SpecError, "E132", message, each.span)
            dims.append(found.dim or Dim.atom(f"({expression.text(each)})"))
        self._define(item.name, Shape(dims[0], dims[1]), item)
        init, saved = {"": item.init}, {"": item.saved}
        for variant in item.variants:
            _known_kind(variant.kind, variant)
            if variant.kind not in kinds:
                message = f"the method does not fit '{variant.kind}', so '{item.name}' has no variant for it"
                fail(SpecError, "E139", message, variant.span)
            if variant.kind in init:
                fail(SpecError, "E131", f"'{item.name}' has two variants for '{variant.kind}'", variant.span)
            init[variant.kind], saved[variant.kind] = variant.init, variant.saved
        for each in init.values():
            self._init(each)
        keys: list[tree.ParamItem | tree.Variant] = [item, *item.variants]
        for node in keys:
            if not _KEY.fullmatch(node.saved):
                help = "a key is words of letters, digits and '_' with '.' between them, as in \"lora_A.weight\""
                message = f"{expression.quoted(node.saved)} cannot be a checkpoint key"
                fail(SpecError, "E137", message, node.span, help=help)
        self.params.append(ParamRule(item.name, item.shape, tuple(init.items()), tuple(saved.items())))

    def _keys_differ(self, kinds: Sequence[str]) -> None:
        for kind in kinds:
            owners: dict[str, str] = {}
            for param in self.params:
                key = param.saved_for(kind)
                if key in owners:
                    message = f"'{param.role}' and '{owners[key]}' are both saved as {expression.quoted(key)}"
                    fail(SpecError, "E137", message, self.places[param.role], help="give each its own key")
                owners[key] = param.role

    def _init(self, expr: tree.Expr) -> None:
        name = expr.id if isinstance(expr, tree.Name) else expr.function if isinstance(expr, tree.Call) else ""
        if name not in INITIALISERS:
            known = f"known initialisers: {', '.join(INITIALISERS)}"
            message = f"'{expression.text(expr)}' is not an initialiser"
            fail(SpecError, "E136", message, expr.span, help=did_you_mean(name, INITIALISERS) or known)
        given = match_arguments(expr)
        for argument, default in INITIALISERS[name]:
            if argument not in given and default is None:
                fail(SpecError, "E136", f"'{name}' needs a value for '{argument}'", expr.span)
        for argument, value in given.items():
            need_number(value, self._type(value), f"'{argument}' of '{name}'")

    def _prime(self, item: tree.PrimeItem) -> None:
        if self.weight is not None:
            fail(SpecError, "E131", "W' is defined twice", item.span)
        found, wanted = self._type(item.value), self.names["W"]
        if found != wanted:
            what = f"a matrix {found}" if isinstance(found, Shape) else str(found)
            fail(SpecError, "E133", f"W' is of shape {wanted}, as W is, and this is {what}", item.value.span)
        self._extent(item.value)
        self.weight = item.value

    def _extent(self, expr: tree.Expr) -> tuple[int, int]:
        """How many nodes, and how deep, once every `let` is written out: what works on closed forms is recursive."""
        parts = [self._extent(each) for each in _operands(expr)]
        if isinstance(expr, tree.Name) and expr.id in self.extents:
            parts = [self.extents[expr.id]]
        nodes, depth = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
        if nodes > MAX_NODES or depth > 2 * MAX_DEPTH:
            fail(SpecError, "E104", "the formula is too large once its 'let's are written out", expr.span)
        return nodes, depth

    def _peft(self, item: tree.PeftItem) -> None:
        if self.peft is not None:
            fail(SpecError, "E131", "'peft' is said twice", item.span)
        self.peft = item
        seen: set[str] = set()
        known = [each.name for each in self.method.hyperparameters]
        for each in item.fields:
            if each.name in seen:
                fail(SpecError, "E131", f"the field '{each.name}' is given twice", each.span)
            seen.add(each.name)
            match each.value:
                case tree.Name(name):
                    if name not in known:
                        unknown_name(each.value, known)
                    self.used.add(name)
                case tree.Number() | tree.Text() | tree.Flag() | tree.Null():
                    pass
                case _:
                    help = "anything else could not be read back from an adapter_config.json"
                    message = "a field's value is a hyperparameter or a literal"
                    fail(SpecError, "E139", message, each.value.span, help=help)


def match_arguments(expr: tree.Expr) -> dict[str, tree.Expr]:
    """The arguments of an initialiser by name, given by position or by name. Raises SpecError (E136)."""
    if not isinstance(expr, tree.Call):
        return {}
    names = [each for each, _ in INITIALISERS[expr.function]]
    given: dict[str, tree.Expr] = {}
    for position, argument in enumerate(expr.arguments):
        if argument.name is None and position >= len(names):
            count = f"at most {len(names)} argument{'s' if len(names) > 1 else ''}" if names else "no arguments"
            fail(SpecError, "E136", f"'{expr.function}' takes {count}", argument.span)
        name = argument.name if argument.name is not None else names[position]
        if name not in names:
            help = did_you_mean(name, names) or (f"it takes {', '.join(names)}" if names else "it takes none")
            fail(SpecError, "E136", f"'{expr.function}' has no argument '{name}'", argument.span, help=help)
        if name in given:
            fail(SpecError, "E136", f"'{name}' is given twice", argument.span)
        given[name] = argument.value
    return given


WHERE_NAMES: Mapping[str, Type] = {
    **dict.fromkeys(KINDS, BOOL),
    "in_features": Scalar("int"),
    "out_features": Scalar("int"),
}


def check_where(expr: tree.Expr) -> None:
    """Raise SpecError (E13x) unless the expression is a predicate on kinds and sizes."""
    need(expr, type_of(expr, WHERE_NAMES), BOOL, "'where'")


def _operands(expr: tree.Expr) -> tuple[tree.Expr, ...]:
    match expr:
        case tree.Call(_, arguments):
            return tuple(each.value for each in arguments)
        case tree.Unary(_, operand) | tree.Transpose(operand):
            return (operand,)
        case tree.Binary(_, left, right):
            return (left, right)
        case tree.Conditional(then, test, otherwise):
            return (then, test, otherwise)
        case _:
            return ()


def _known_kind(kind: str, node: tree.Node) -> None:
    if kind not in KINDS:
        help = did_you_mean(kind, KINDS) or f"the kinds are {', '.join(KINDS)}"
        fail(SpecError, "E139", f"'{kind}' is not a kind of module", node.span, help=help)


def _head(method: tree.Method) -> Span | None:
    """Where the method's name stands."""
    if method.span is None:
        return None
    start = method.span.source.text.find(method.name, method.span.start + len("method"))
    return Span(method.span.source, start, start + len(method.name))
