"""A method definition, checked: from tree to rule. Everything that can be known before a model is, is known here."""

from collections.abc import Mapping, Sequence

from peftc.grammar.algebra.shapes import Dim, Shape, differ
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.allocate import check_allocation
from peftc.grammar.method.check_tensors import (
    COUNTED,
    OF_PLACES,
    TOGETHER,
    TensorChecks,
    check_key,
    check_kind,
    check_no_task,
)
from peftc.grammar.method.infer import BOOL, TEXT, Scalar, Type, need, type_of
from peftc.grammar.method.peft_item import check_field, names_in
from peftc.grammar.method.rule import (
    COMPATIBLE,
    KINDS,
    LAST,
    PLACES,
    AllocationRule,
    DefaultTargets,
    MethodRule,
    ParamRule,
)
from peftc.grammar.method.scalar import evaluate
from peftc.grammar.source import Span
from peftc.grammar.syntax import expression, tree


def check_method(method: tree.Method, methods: Mapping[str, MethodRule] | None = None) -> MethodRule:
    """The rule a definition stands for. Raises SpecError (E13x) at the first thing wrong with it.

    `methods` are those it may take its default targets from.
    """
    return _Checker(method, methods or {}).rule()


# What a method for a place defines, or for weights.
_PRIMES = {
    "": ("W", "b"),
    "attention": ("prompt", "gate"),
    "cache": ("prompt",),
    "prompt": ("prompt", "labels"),
}


class _Checker(TensorChecks):
    def __init__(self, method: tree.Method, methods: Mapping[str, MethodRule]):
        super().__init__()
        self.method = method
        self.methods = methods
        self.lets: list[tuple[str, tree.Expr]] = []
        self.defaults: dict[str, tuple[DefaultTargets, ...]] = {}
        self.primes: dict[str, tree.Expr] = {}
        self.settled = ("", "")
        self.requires: list[tree.Expr] = []
        self.peft: tree.PeftItem | None = None
        self.allocation: AllocationRule | None = None
        self.copies = ""
        self.rows = ""
        self.unread: tuple[str, ...] = ()

    def rule(self) -> MethodRule:
        method = self.method
        for each in method.hyperparameters:
            self._hyperparameter(each)
        for name in ("in", "out", *TOGETHER, *COUNTED, "kernel"):
            self.names[name] = Scalar("int", dim=Dim.atom(name))
        self.names["channels"] = Scalar("int", dim=Dim.atom("(in // kernel)"))
        self.names["has_bias"] = BOOL
        self.names["category"] = TEXT
        self.names["Ws"] = Shape((Dim.atom("members"), Dim.atom("tallest"), Dim.atom("in")))
        self.names["kind"] = Scalar("text", choices=KINDS)
        self.names["W"] = Shape((Dim.atom("out"), Dim.atom("in")))
        self.names["b"] = Shape((Dim.atom("out"),))
        kinds = self._kinds()
        if set(kinds) & set(PLACES):
            self.names |= {name: Scalar("int", dim=Dim.atom(name)) for name in OF_PLACES}
        for item in method.items:
            match item:
                case tree.ParamItem():
                    self._param(item, kinds)
                case tree.LetItem():
                    self._define(item.name, self._type(item.value), item)
                    nodes, depth = self._extent(item.value)
                    # A scalar is a number wherever it is used.
                    self.extents[item.name] = (1 if isinstance(self.names[item.name], Scalar) else nodes, depth)
                    self.lets.append((item.name, item.value))
                    if item.saved:
                        self._settled(item, kinds)
                case tree.ConstItem():
                    self._const(item)
                case tree.RequireItem(test):
                    need(test, self._type(test), BOOL, "'require'")
                    self.requires.append(test)
                case tree.DefaultItem() | tree.DefaultAsItem():
                    self._default(item)
                case tree.PrimeItem():
                    self._prime(item, kinds)
                case tree.AllocateItem():
                    if self.allocation is not None:
                        fail(SpecError, "E131", "'allocate' is said twice", item.span)
                    self.allocation = check_allocation(item, self.params, kinds, self.names, self._type)
                case tree.CopiesItem(key):
                    check_key(key, item)
                    self.copies = key
                case tree.RowsItem(key):
                    check_key(key, item)
                    self.rows = key
                case tree.UnreadItem(keys):
                    for key in keys:
                        check_key(key, item)
                    self.unread = (*self.unread, *keys)
                case tree.PeftItem():
                    self._peft(item)
                case _:
                    pass
        if (self.copies or self.rows) and (self.primes or self.params or kinds or (self.copies and self.rows)):
            what = "rows of embeddings" if self.rows else "copies of whole modules"
            message = f"'{method.name}' trains {what}: it has no kinds, parameters or formula"
            fail(SpecError, "E135", message, method_name(method))
        self._check_primes(kinds)
        self._check_tasks()
        self._all_used()
        self._keys_differ(kinds)
        return MethodRule(
            name=method.name,
            hyperparameters=method.hyperparameters,
            kinds=kinds,
            params=tuple(self.params),
            lets=tuple(self.lets),
            order=tuple(
                name for name in self.places if name in {*dict(self.lets), *(each.role for each in self.params)}
            ),
            weight=self.primes.get("W"),
            bias=self.primes.get("b"),
            prompt=self.primes.get("prompt"),
            gate=self.primes.get("gate"),
            labels=self.primes.get("labels"),
            settled=self.settled,
            requires=tuple(self.requires),
            defaults=tuple(self.defaults.items()),
            peft_type=self.peft.type if self.peft else "",
            peft_fields=self.peft.fields if self.peft else (),
            copies=self.copies,
            rows=self.rows,
            unread=self.unread,
            allocation=self.allocation,
            counts_sites=not self.used.isdisjoint((*COUNTED, "category")),
            doc=method.doc,
            span=method.span,
        )

    def _settled(self, item: tree.LetItem, kinds: Sequence[str]) -> None:
        check_key(item.saved, item)
        if not set(kinds) & set(PLACES):
            help = "a weight's parameters are saved as they are"
            fail(SpecError, "E135", "what is computed is saved for a prompt' only", item.span, help)
        if self.settled[0]:
            fail(SpecError, "E131", f"'{self.settled[0]}' is saved as a value already", item.span)
        if not isinstance(self.names[item.name], Shape):
            fail(SpecError, "E132", f"'{item.name}' is a number: only a tensor is saved", item.span)
        self.settled = (item.name, item.saved)

    def _check_primes(self, kinds: Sequence[str]) -> None:
        """Raise E135 unless the method defines what methods for its kinds define."""
        name, defined = self.method.name, set(self.primes)
        if not set(kinds) & set(PLACES):
            if not defined & {"W", "b"} and not (self.copies or self.rows):
                help = "say what the adapted weight is: W' = W + ..."
                fail(SpecError, "E135", f"the method '{name}' does not define W'", method_name(self.method), help=help)
        elif "prompt" not in defined:
            help = "say what is put in front: prompt' = ..."
            fail(SpecError, "E135", f"'{name}' does not define prompt'", method_name(self.method), help=help)

    def _check_tasks(self) -> None:
        """Raise E138 where a task is asked for by what is computed without a call, or stands in front of it."""
        starts = [init for each in self.params for _, init in each.init]
        fronts = [self.primes[name] for name in self.primes if name not in ("W", "b")]
        for each in (*starts, *fronts):
            check_no_task(each, dict(self.lets))

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
                fail(SpecError, "E151", f"the default of '{item.name}' is not a choice", default.span, help=help)
        dim = Dim.atom(item.name) if item.type == "int" and not optional else None
        self._define(item.name, Scalar(item.type, optional, item.choices, dim), item)

    def _all_used(self) -> None:
        reached = self._reached()
        for param in self.params:
            if param.role not in reached:
                made = "prompt'" if "prompt" in self.primes else "W'"
                help = f"a parameter that {made} does not depend on would never be trained" if param.trained else ""
                what = "parameter" if param.trained else "constant"
                message = f"the {what} '{param.role}' is never used"
                fail(SpecError, "E134", message, self.places[param.role], help=help)
        for name, _ in self.lets:
            if name not in self.used:
                fail(SpecError, "E134", f"'let {name}' is never used", self.places[name])
        if "prompt" in self.primes:
            self.used.add(COMPATIBLE)
        for each in self.method.hyperparameters if self._kinds() == ("attention",) else ():
            if each.name == LAST:
                self.used.add(LAST)
                if each.type != "int":
                    message = f"'{LAST}' of a method for attention is a whole number: how many modules it is for"
                    fail(SpecError, "E132", message, each.span)
        for each in self.method.hyperparameters:
            if each.name not in self.used:
                fail(SpecError, "E134", f"the hyperparameter '{each.name}' is never used", each.span)

    def _reached(self) -> set[str]:
        """The names W' and b' depend on, through lets and what tensors start from."""
        lets = {name: [value] for name, value in self.lets}
        if "Ws" in self._closure(lets):
            help = "compute what is needed of it once: const ... = ... recomputed"
            fail(
                SpecError, "E156", "'Ws' is known only when tensors are first made", method_name(self.method), help=help
            )
        starts = {each.role: [init for _, init in each.init] for each in self.params}
        kept = {each.role for each in self.params if each.trained or (each.saved and each.saved_when is None)}
        remade = {role: inits for role, inits in starts.items() if role not in kept}
        for name in sorted(self._closure({**lets, **remade}) & {each.role for each in self.params if each.once}):
            help = "let W' read a 'param', or a 'const ... saved', that starts from it"
            fail(SpecError, "E156", f"'{name}' is there only when tensors are first made", self.places[name], help=help)
        return self._closure({**lets, **starts})

    def _closure(self, meant: Mapping[str, Sequence[tree.Expr]]) -> set[str]:
        reached: set[str] = set()
        waiting: list[tree.Expr] = list(self.primes.values())
        while waiting:
            names = names_in(waiting.pop())
            for each in names - reached:
                waiting += meant.get(each, [])
            reached |= names
        return reached

    # --- items ---

    def _kinds(self) -> tuple[str, ...]:
        for item in self.method.items:
            if isinstance(item, tree.KindsItem):
                for kind in item.kinds:
                    check_kind(kind, item)
                if set(item.kinds) & set(PLACES) and len(item.kinds) > 1:
                    place = next(each for each in item.kinds if each in PLACES)
                    help = f"{', '.join(PLACES)} are no weights: each takes methods of its own"
                    fail(SpecError, "E139", f"a method for {place} is for nothing else", item.span, help)
                if len(set(item.kinds)) != len(item.kinds):
                    fail(SpecError, "E131", "a kind is named twice", item.span)
                return item.kinds
        if any(isinstance(item, tree.CopiesItem | tree.RowsItem) for item in self.method.items):
            return ()
        help = f"begin with 'on' and some of: {', '.join(KINDS)}\nor one of: {', '.join(PLACES)}"
        message = f"the method '{self.method.name}' does not say which kinds of module it fits"
        fail(SpecError, "E139", message, method_name(self.method), help=help)

    def _default(self, item: tree.DefaultItem | tree.DefaultAsItem) -> None:
        if isinstance(item, tree.DefaultAsItem):
            if item.method not in self.methods:
                help = did_you_mean(item.method, self.methods)
                fail(SpecError, "E140", f"there is no method '{item.method}'", item.span, help=help)
            self.defaults = {**dict(self.methods[item.method].defaults), **self.defaults}
            return
        known = {each.name: each for each in self.method.hyperparameters}
        for argument in item.overrides:
            if argument.name not in known:
                help = did_you_mean(str(argument.name), known)
                fail(SpecError, "E141", f"there is no hyperparameter '{argument.name}'", argument.span, help=help)
            need(argument.value, type_of(argument.value, {}), Scalar(known[argument.name].type), "'with'")
        overrides = tuple((str(each.name), evaluate(each.value, {})) for each in item.overrides)
        for name in item.architectures:
            if any(overrides == other for _, other in self.defaults.get(name, ())):
                fail(SpecError, "E131", f"'{name}' already has default targets", item.span)
            self.defaults[name] = (*self.defaults.get(name, ()), (item.targets, overrides))

    def _keys_differ(self, kinds: Sequence[str]) -> None:
        for kind in kinds:
            owners: dict[str, ParamRule] = {}
            for param in self.params:
                key = param.saved_for(kind)
                other = owners.get(key)
                # Two may share a key where never both exist, which only a site can tell.
                if key and other is not None and None in (param.condition, other.condition):
                    message = f"'{param.role}' and '{other.role}' are both saved as {expression.quoted(key)}"
                    fail(SpecError, "E137", message, self.places[param.role], help="give each its own key")
                owners[key] = param

    def _prime(self, item: tree.PrimeItem, kinds: Sequence[str]) -> None:
        if item.target in self.primes:
            fail(SpecError, "E131", f"{item.target}' is defined twice", item.span)
        place = next((each for each in kinds if each in PLACES), "")
        allowed = _PRIMES[place]
        if kinds and item.target not in allowed:
            help = f"it defines {' and perhaps '.join(each + chr(39) for each in allowed)}"
            others = [each for each, names in _PRIMES.items() if each and item.target in names]
            help += "; it changes no weight" if place else f"; one for {' or '.join(others)} defines {item.target}'"
            fail(SpecError, "E135", f"a method for {kinds[0]} cannot define {item.target}'", item.span, help)
        found = self._type(item.value)
        what = f"a tensor {found}" if isinstance(found, Shape) else str(found)
        if item.target == "prompt":
            rows = isinstance(found, Shape) and len(found.sizes) in (2, 3)
            if not rows or differ(found.sizes[-1], Dim.atom("out")):  # type: ignore[union-attr]
                message = f"prompt' is of shape [length, out], or [tasks, length, out], and this is {what}"
                fail(SpecError, "E133", message, item.value.span)
        elif item.target == "gate":
            if not isinstance(found, Shape) or found.sizes != (Dim.constant(1),):
                fail(SpecError, "E133", f"gate' is of shape [1], and this is {what}", item.value.span)
        elif item.target == "labels":
            if not isinstance(found, Shape) or len(found.sizes) != 1:
                message = f"labels' is of shape [length], as long as prompt' is, and this is {what}"
                fail(SpecError, "E133", message, item.value.span)
        else:
            wanted = self.names[item.target]
            assert isinstance(wanted, Shape)
            fits = isinstance(found, Shape) and len(found.sizes) == len(wanted.sizes)
            if not fits or any(map(differ, found.sizes, wanted.sizes)):  # type: ignore[union-attr]
                message = f"{item.target}' is of shape {wanted}, as {item.target} is, and this is {what}"
                fail(SpecError, "E133", message, item.value.span)
        self._extent(item.value)
        self.primes[item.target] = item.value

    def _peft(self, item: tree.PeftItem) -> None:
        if self.peft is not None:
            fail(SpecError, "E131", "'peft' is said twice", item.span)
        self.peft = item
        seen: set[str] = set()
        for each in item.fields:
            if each.name in seen:
                fail(SpecError, "E131", f"the field '{each.name}' is given twice", each.span)
            seen.add(each.name)
            vector = self.allocation.axes[0][0] if self.allocation else ""
            placed = (*OF_PLACES, "in", "out") if "prompt" in self.primes else ()
            self.used |= check_field(each, self.method.hyperparameters, vector, placed)


WHERE_NAMES: Mapping[str, Type] = {
    **dict.fromkeys(KINDS, BOOL),
    "in_features": Scalar("int"),
    "out_features": Scalar("int"),
}


def check_where(expr: tree.Expr) -> None:
    """Raise SpecError (E13x) unless the expression is a predicate on kinds and sizes."""
    need(expr, type_of(expr, WHERE_NAMES), BOOL, "'where'")


def method_name(method: tree.Method) -> Span | None:
    """Where the method's name stands."""
    if method.span is None:
        return None
    start = method.span.source.text.find(method.name, method.span.start + len("method"))
    return Span(method.span.source, start, start + len(method.name))
