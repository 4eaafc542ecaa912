"""The names and tensors of a method definition, checked one by one as they are met."""

import re
from collections.abc import Mapping, Sequence

from peftc.grammar.algebra.functions import FUNCTIONS, MAX_AXES, TASK
from peftc.grammar.algebra.shapes import Shape, differ
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.infer import BOOL, DROP, INT, TEXT, Scalar, Type, need, size_of, type_of
from peftc.grammar.method.infer import number as need_number
from peftc.grammar.method.initialisers import (
    MEASURED,
    ROUNDED,
    TYPED,
    branches,
    initialiser,
    match_arguments,
    unknown_initialiser,
)
from peftc.grammar.method.rule import KINDS, PLACES, ParamRule
from peftc.grammar.method.scalar import SCALAR_FUNCTIONS
from peftc.grammar.source import Span
from peftc.grammar.syntax import expression, tree
from peftc.grammar.syntax.build_expression import MAX_DEPTH

# Sizes of all the sites of an adapter, for what they share: the largest weight, how many there are, sums of sizes.
TOGETHER = ("max_in", "max_out", "sites", "total", "total_in", "total_out")
# A site's number among them, the sums of the sizes of those before it, how many are of its category and the largest
# `out` of these.
COUNTED = ("site", "before_in", "before_out", "members", "tallest")
# `in` of a convolution is the product of these; elsewhere the kernel is 1.
UNDER_KERNEL = ("channels", "kernel")
# Of a place that is no weight: how many layers its model has, how many heads of keys each, and how many stacks of
# layers: two where an encoder stands beside the decoder.
OF_PLACES = ("num_layers", "num_heads", "num_stacks")

_RESERVED = frozenset(
    {
        *("in", "out", "W", "b", "if", "else", "not", "and", "or", "true", "false", "none", "has_bias", "kind", DROP),
        *("category", "Ws"),
        *TOGETHER,
        *COUNTED,
        *UNDER_KERNEL,
        *SCALAR_FUNCTIONS,
    }
)
MAX_NODES = 2000

_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class TensorChecks:
    """What is known of a definition so far, and the checks of its tensors; `check_method` drives them."""

    def __init__(self) -> None:
        self.names: dict[str, Type] = {}
        self.places: dict[str, Span | None] = {}
        self.used: set[str] = set()
        self.params: list[ParamRule] = []
        self.extents: dict[str, tuple[int, int]] = {}

    # --- names ---

    def _type(self, expr: tree.Expr) -> Type:
        return type_of(expr, self.names, self.used)

    def _define(self, name: str, type: Type, node: tree.Node) -> None:
        if name in _RESERVED:
            fail(SpecError, "E154", f"'{name}' is a word of the language and cannot be a name", node.span)
        if name in self.names:
            place = self.places.get(name)
            help = f"it is defined in line {place.line}" if place is not None else ""
            fail(SpecError, "E131", f"'{name}' is defined twice", node.span, help=help)
        self.names[name] = type
        self.places[name] = node.span

    # --- tensors ---

    def _param(self, item: tree.ParamItem, kinds: Sequence[str]) -> None:
        shape = self._tensor(item)
        init, saved = {"": item.init}, {"": item.saved}
        for variant in item.variants:
            check_kind(variant.kind, variant)
            if variant.kind not in kinds:
                message = f"the method does not fit '{variant.kind}', so '{item.name}' has no variant for it"
                fail(SpecError, "E139", message, variant.span)
            if variant.kind in init:
                fail(SpecError, "E131", f"'{item.name}' has two variants for '{variant.kind}'", variant.span)
            init[variant.kind], saved[variant.kind] = variant.init, variant.saved
        for each in init.values():
            self._init(each, shape)
        check_key(item.saved, item)
        for variant in item.variants:
            check_key(variant.saved, variant)
        self._group(item)
        self._define(item.name, shape, item)
        self.params.append(
            ParamRule(
                item.name,
                item.shape,
                tuple(init.items()),
                tuple(saved.items()),
                kernel=item.kernel,
                shared=item.shared,
                condition=item.condition,
                group=item.group,
            )
        )

    def _const(self, item: tree.ConstItem) -> None:
        shape = self._tensor(item)
        self._init(item.init, shape)
        if item.saved is not None:
            check_key(item.saved, item)
        if item.saved_when is not None:
            need(item.saved_when, self._type(item.saved_when), BOOL, "'when'")
        if item.seed is not None:
            need(item.seed, self._type(item.seed), INT, "'seeded'")
        if item.once and item.saved is not None:
            fail(SpecError, "E136", f"'{item.name}' is saved, and so not there only once", item.span)
        if not item.once and item.saved is None and item.seed is None and any(map(_is_chance, branches(item.init))):
            help = 'say where it comes from the next time: seeded ..., or saved "..."; or once, if others start from it'
            fail(SpecError, "E136", f"'{expression.text(item.init)}' cannot be recomputed", item.init.span, help=help)
        self._group(item)
        self._define(item.name, shape, item)
        self.params.append(
            ParamRule(
                item.name,
                item.shape,
                (("", item.init),),
                () if item.saved is None else (("", item.saved),),
                trained=False,
                shared=item.shared,
                condition=item.condition,
                saved_when=item.saved_when,
                seed=item.seed,
                once=item.once,
                group=item.group,
            )
        )

    def _group(self, item: tree.ParamItem | tree.ConstItem) -> None:
        if item.group is None:
            return
        found = self._type(item.group)
        need(item.group, found, TEXT if found == TEXT else INT, "'by'")
        if not item.shared:
            help = f"write 'shared {'param' if isinstance(item, tree.ParamItem) else 'const'}'"
            fail(SpecError, "E139", f"'{item.name}' belongs to a site, and 'by' groups sites", item.span, help=help)

    def _tensor(self, item: tree.ParamItem | tree.ConstItem) -> Shape:
        if len(item.shape) > MAX_AXES:
            message = f"a parameter has 1 to {MAX_AXES} sizes; '{item.name}' has {len(item.shape)}"
            fail(SpecError, "E133", message, item.span)
        if item.condition is not None:
            need(item.condition, self._type(item.condition), BOOL, "'if'")
        seeded = isinstance(item, tree.ConstItem) and item.seed is not None
        starts = {initialiser(each) for each in branches(item.init)}
        if (item.shared or seeded) and starts & {*MEASURED, ROUNDED}:
            of = "weight" if ROUNDED in starts else "inputs"
            message = f"'{item.name}' is made of the {of} of a site: it can be neither shared nor seeded"
            fail(SpecError, "E136", message, item.init.span)
        if seeded and any(initialiser(each) in TYPED for each in branches(item.init)):
            fail(SpecError, "E136", f"nothing of '{item.name}' is drawn, so there is nothing to seed", item.init.span)
        return Shape(tuple(size_of(each, self._type(each)) for each in item.shape))

    def _init(self, expr: tree.Expr, shape: Shape) -> None:
        if isinstance(expr, tree.Conditional):
            need(expr.test, self._type(expr.test), BOOL, "a condition")
            self._init(expr.then, shape)
            self._init(expr.otherwise, shape)
            return
        if not initialiser(expr):
            if isinstance(expr, tree.Name | tree.Call) and not self._known(expr):
                unknown_initialiser(expr)
            found = self._type(expr)
            self._extent(expr)
            if isinstance(found, Scalar):
                unknown_initialiser(expr, fills=found.kind in ("int", "float"))
            elif len(found.sizes) != len(shape.sizes) or any(map(differ, found.sizes, shape.sizes)):
                message = f"this is to be of shape {shape}, and starts as a tensor {found}"
                fail(SpecError, "E133", message, expr.span)
            return
        square = self.names["W"]
        assert isinstance(square, Shape)
        if initialiser(expr) in MEASURED and shape.sizes != (square.sizes[1],) * 2:
            message = f"a {initialiser(expr)} of inputs is of shape [in, in], and this is to be {shape}"
            fail(SpecError, "E133", message, expr.span)
        if initialiser(expr) == ROUNDED and shape.sizes != square.sizes:
            message = f"a {ROUNDED} is of the weight's shape [out, in], and this is to be {shape}"
            fail(SpecError, "E133", message, expr.span)
        for argument, value in match_arguments(expr).items():
            if initialiser(expr) in TYPED:
                wanted = Scalar(TYPED[initialiser(expr)], True)
                need(value, self._type(value), wanted, f"'{argument}' of '{initialiser(expr)}'")
            else:
                need_number(value, self._type(value), f"'{argument}' of '{initialiser(expr)}'")

    def _known(self, expr: tree.Name | tree.Call) -> bool:
        return expr.id in self.names if isinstance(expr, tree.Name) else expr.function in FUNCTIONS

    def _extent(self, expr: tree.Expr) -> tuple[int, int]:
        """How many nodes, and how deep, once every `let` is written out: what works on closed forms is recursive."""
        parts = [self._extent(each) for each in _operands(expr)]
        if isinstance(expr, tree.Name) and expr.id in self.extents:
            parts = [self.extents[expr.id]]
        nodes, depth = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
        if nodes > MAX_NODES or depth > 2 * MAX_DEPTH:
            fail(SpecError, "E104", "the formula is too large once its 'let's are written out", expr.span)
        return nodes, depth


def check_no_task(expr: tree.Expr, lets: Mapping[str, tree.Expr]) -> None:
    """Raise E138 where an expression, its `let`s written out, asks for what only a call can tell."""
    waiting, seen = [expr], set[str]()
    while waiting:
        each = waiting.pop()
        if isinstance(each, tree.Call) and each.function == TASK:
            help = "let W' or b' ask for it"
            fail(SpecError, "E138", f"'{TASK}' is known when a model is called, and not here", each.span, help=help)
        if isinstance(each, tree.Name) and each.id in lets and each.id not in seen:
            seen.add(each.id)
            waiting.append(lets[each.id])
        waiting += _operands(each)


def _is_chance(expr: tree.Expr) -> bool:
    """Whether a start is not the same the next time."""
    return initialiser(expr) not in ("", "zeros", "ones", "constant", "listed")


def _operands(expr: tree.Expr) -> tuple[tree.Expr, ...]:
    match expr:
        case tree.Call(_, arguments):
            return tuple(each.value for each in arguments)
        case tree.Sequence(items):
            return items
        case tree.Unary(_, operand) | tree.Transpose(operand):
            return (operand,)
        case tree.Binary(_, left, right):
            return (left, right)
        case tree.Conditional(then, test, otherwise):
            return (then, test, otherwise)
        case _:
            return ()


def check_key(key: str, node: tree.Node) -> None:
    """Raise E137 unless the text can be a checkpoint key."""
    if not _KEY.fullmatch(key):
        help = "a key is words of letters, digits and '_' with '.' between them, as in \"lora_A.weight\""
        fail(SpecError, "E137", f"{expression.quoted(key)} cannot be a checkpoint key", node.span, help=help)


def check_kind(kind: str, node: tree.Node) -> None:
    """Raise E139 unless the word is a kind of module."""
    if kind not in KINDS + PLACES:
        help = did_you_mean(kind, KINDS + PLACES) or f"the kinds are {', '.join(KINDS + PLACES)}"
        fail(SpecError, "E139", f"'{kind}' is not a kind of module", node.span, help=help)
