"""A rule at a place: its closed form, and the tensors it is over."""

import math
from collections.abc import Mapping

from peftc.grammar.algebra import algebra
from peftc.grammar.algebra.functions import MisfitError
from peftc.grammar.algebra.measure import sizes_of
from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.method.allocate import bound_allocation, check_schedule
from peftc.grammar.method.expression_lowering import ClosedForms, Place
from peftc.grammar.method.initialisers import INITIALISERS, TYPED, initialiser, match_arguments
from peftc.grammar.method.peft_item import names_in
from peftc.grammar.method.rule import BoundParam, BoundRule, Derived, Init, MethodRule, ParamRule, Value, Values
from peftc.grammar.source import Span
from peftc.grammar.syntax import expression, tree

__all__ = ["Place", "bind", "stacked_axis"]

MAX_ELEMENTS = 2**31
WITHOUT_BIAS = ("embedding", "parameter")
OWN_BIAS = ("multihead_attention",)  # kinds that cannot be given a bias they were made without

Shapes = Mapping[str, tuple[int, ...]]


def bind(rule: MethodRule, values: Values, place: Place, *, span: Span | None = None, strict: bool = True) -> BoundRule:
    """The rule's closed form at a place, with values for its hyperparameters.

    The tree depends on the hyperparameters' *values* only through conditionals, dropout and the options of functions:
    every scalar factor is a name, so adapters that differ in a factor have equal trees. `strict` refuses a rank above
    the weight's own. Raises SpecError (E21x).
    """
    if place.kind not in rule.kinds:
        message = f"'{rule.name}' does not fit {place} of kind '{place.kind}'; it fits {', '.join(rule.kinds)}"
        fail(SpecError, "E214", message, span)
    for name, value in values:
        if isinstance(value, float) and not math.isfinite(value):
            fail(SpecError, "E213", f"{name} = {value} is not a finite number", span)
    scope: dict[str, Value] = {
        **dict(values),
        "in": place.in_features,
        "out": place.out_features,
        "max_in": max(place.in_features, place.largest[0]),
        "max_out": max(place.out_features, place.largest[1]),
        "sites": place.sites,
        "total": max(place.out_features * place.in_features, place.total),
        "total_in": max(place.in_features, place.sums[0]),
        "total_out": max(place.out_features, place.sums[1]),
        "site": place.index,
        "before_in": place.before[0],
        "before_out": place.before[1],
        "has_bias": place.has_bias,
        "category": place.category,
        "members": place.members,
        "tallest": max(place.out_features, place.tallest),
        "kind": place.kind,
        "channels": place.in_features // place.kernel,
        "kernel": place.kernel,
        "num_layers": place.layers,
        "num_heads": place.heads,
        "num_stacks": place.stacks,
    }
    binder = _Binder(rule, scope, span, place)
    binder.check_requirements()
    if strict and rule.prompt is None:
        _check_rank(rule, scope, span, place)
    bound = binder.rule_at()
    if strict and bound.allocation is not None:
        role, axis = bound.allocation.axes[0]
        count = next(each.shape[axis] for each in bound.params if each.role == role)
        check_schedule(bound.allocation, count, f"'{role}' of {place}", span)
    return bound


def _check_rank(rule: MethodRule, scope: Mapping[str, Value], span: Span | None, place: Place) -> None:
    hyperparameters = {each.name for each in rule.hyperparameters}
    rows, columns = scope["out"], scope["in"]
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    for param in rule.params:
        if param.shared or not param.trained:
            continue
        names = [each.id for each in param.shape if isinstance(each, tree.Name)]
        if not {"in", "out"} & set(names):
            continue
        for name in names:
            size = scope.get(name)
            if name in hyperparameters and isinstance(size, int) and size > min(rows, columns):
                message = f"{name} = {size} is more than {place} of size {rows} x {columns} can use"
                help = f"at most {min(rows, columns)} is of use here"
                fail(SpecError, "E211", message, span, help=help)


class _Binder(ClosedForms):
    def check_requirements(self) -> None:
        """Raise E216 where the site is not what the method requires."""
        for test in self.rule.requires:
            if not self.scalar(test):
                names = [name for name in sorted(names_in(test)) if name in self.scope]
                values = {name: expression.text(expression.literal(self.scope[name])) for name in names}
                given = " and ".join(f"{name} = {value}" for name, value in values.items())
                message = f"'{self.rule.name}' does not fit {self.place}: it needs {expression.text(test)}"
                fail(SpecError, "E216", message, self.span or test.span, help=f"there {given}")

    def rule_at(self) -> BoundRule:
        """The closed forms, and the tensors they are over."""
        shapes = self.shapes = {each.role: self._shape(each) for each in self.present.values()}
        base = (self.place.out_features, self.place.in_features)
        weight = algebra.Weight() if self.rule.weight is None else self._known_bias(self.rule.weight, self.rule.weight)
        self._measured(weight, base, shapes)
        bias = None if self.rule.bias is None else self.over_bias(self.matrix(self.rule.bias), self.rule.bias)
        changed = bias not in (None, algebra.Bias())
        if bias is not None and changed and (self.place.has_bias or algebra.without_bias(bias) is not None):
            if self.place.kind in WITHOUT_BIAS or (self.place.kind in OWN_BIAS and not self.place.has_bias):
                message = f"'{self.rule.name}' adapts a bias, and {self.place} of kind '{self.place.kind}' has none"
                fail(SpecError, "E217", message, self.span)
            self._measured(bias, base[:1], shapes)
        prompt, gate = self._prompt(), None if self.rule.gate is None else self.matrix(self.rule.gate)
        labels = None if prompt is None or self.rule.labels is None else self._labels(self.rule.labels, prompt)
        formulas = [each for each in (weight, bias, prompt, gate, labels) if each is not None]
        scalars = self._scalars_of(*formulas)
        params = tuple(self.param(each, shapes) for each in self.present.values())
        self._keys_differ(params)
        nodes = [node for each in formulas for node in algebra.walk(each)]
        read = {each.role for each in nodes if isinstance(each, algebra.Param)}
        drafts = tuple(each for each in params if not (each.trained or each.saved or each.role in read))
        params = tuple(each for each in params if each not in drafts)
        values = tuple((each.name, self.scope[each.name]) for each in self.rule.hyperparameters)
        unchanged = bias is None or bias == algebra.Bias()
        budgeted = self.rule.allocation
        if budgeted is not None and not {role for role, _ in budgeted.axes} <= set(self.present):
            budgeted = None
        allocation = None if budgeted is None else bound_allocation(budgeted, self.scalar)
        return BoundRule(
            self.rule,
            values,
            weight,
            scalars,
            params,
            None if unchanged else bias,
            drafts,
            allocation,
            prompt=prompt,
            gate=gate,
            settled=self._settled(prompt),
            labels=labels,
        )

    def _settled(self, prompt: algebra.Matrix | None) -> tuple[algebra.Matrix, tuple[int, ...], str] | None:
        """The part of the prompt that is saved as a value too, its shape and key."""
        name, key = self.rule.settled
        part = self.matrices.get(name)
        if prompt is None or part is None or part not in algebra.walk(prompt):
            return None
        return part, sizes_of(part, self.shapes, self.place.sizes), key

    def _prompt(self) -> algebra.Matrix | None:
        if self.rule.prompt is None:
            return None
        prompt, place = self._known_bias(self.rule.prompt, self.rule.prompt), self.place
        if place.kind != "prompt" and any(isinstance(each, algebra.Weight) for each in algebra.walk(prompt)):
            fail(SpecError, "E217", f"'{self.rule.name}' uses W, and there is no weight in '{place.kind}'", self.span)
        try:
            found = sizes_of(prompt, self.shapes, place.sizes)
        except MisfitError as misfit:
            fail(SpecError, "E216", f"'{self.rule.name}' does not fit {place}: {misfit}", self.span)
        if found[-1] != place.out_features:
            message = f"prompt' of '{self.rule.name}' has {found[-1]} columns, and {place} takes {place.out_features}"
            fail(SpecError, "E216", message, self.span)
        return prompt

    def _labels(self, expr: tree.Expr, prompt: algebra.Matrix) -> algebra.Matrix:
        labels = self.matrix(expr)
        if any(isinstance(each, algebra.Weight | algebra.Bias) for each in algebra.walk(labels)):
            fail(SpecError, "E217", f"labels' of '{self.rule.name}' are whole numbers, and W is not", self.span)
        try:
            (found,) = sizes_of(labels, self.shapes, self.place.sizes)
            length = sizes_of(prompt, self.shapes, self.place.sizes)[-2]
            if found != length:
                raise MisfitError(f"labels' are {found}, and prompt' is {length} long")
        except MisfitError as misfit:
            fail(SpecError, "E216", f"'{self.rule.name}' does not fit {self.place}: {misfit}", self.span)
        return labels

    def _scalars_of(self, *matrices: algebra.Matrix) -> tuple[tuple[str, float], ...]:
        nodes = [node for each in matrices for node in algebra.walk(each)]
        names = dict.fromkeys(node.scalar for node in nodes if isinstance(node, algebra.Scaled))
        return tuple((name, self.scalars[name]) for name in names)

    def _keys_differ(self, params: tuple[BoundParam, ...]) -> None:
        owners: dict[str, str] = {}
        for each in params:
            if each.saved and each.saved in owners:
                message = f"'{owners[each.saved]}' and '{each.role}' would both be saved as '{each.saved}' there"
                fail(SpecError, "E217", message, self.span)
            owners[each.saved] = each.role

    def _measured(self, matrix: algebra.Matrix, wanted: tuple[int, ...], shapes: Shapes) -> None:
        place = self.place
        try:
            found = sizes_of(matrix, shapes, (place.out_features, place.in_features))
            if found != wanted:
                raise MisfitError(f"the result is {list(found)}, and has to be {list(wanted)}")
        except MisfitError as misfit:
            size = f"{place.out_features} x {place.in_features}"
            message = f"'{self.rule.name}' does not fit {place} of size {size}: {misfit}"
            fail(SpecError, "E216", message, self.span)

    # --- parameters ---

    def param(self, param: ParamRule, shapes: Shapes) -> BoundParam:
        """The tensor at the site."""
        init, shape = dict(param.init), shapes[param.role]
        found = self._init(init.get(self.place.kind, init[""]), shape, shapes)
        seed = None if param.seed is None else self.scalar(param.seed)
        group = None if param.group is None else self.scalar(param.group)
        assert seed is None or isinstance(seed, int)
        assert group is None or isinstance(group, int | str)
        keep = param.saved_when is None or bool(self.scalar(param.saved_when))
        again = param.seed is not None or (not param.trained and isinstance(found, Derived))
        return BoundParam(
            param.role,
            self._stored(param, shape),
            found,
            _numbered(param.saved_for(self.place.kind), group) if keep or again else "",
            trained=param.trained,
            shared=param.shared,
            optional=again,
            seed=seed,
            written=keep,
            stacked_axis=stacked_axis(param) if self.place.count > 1 else None,
            group=group,
        )

    def _shape(self, param: ParamRule) -> tuple[int, ...]:
        shape: list[int] = []
        for expr in param.shape:
            size = self.scalar(expr)
            assert isinstance(size, int), size
            written = expression.text(expr)
            if size < 1:
                message = f"{written} = {size} leaves the parameter '{param.role}' empty; it must be at least 1"
                fail(SpecError, "E210", message, self.span or expr.span)
            shape.append(size)
        if math.prod(self._stored(param, tuple(shape))) > MAX_ELEMENTS:
            sizes = " x ".join(map(str, shape))
            message = f"the parameter '{param.role}' of {self.place} would be {sizes}, more than 2^31 numbers"
            fail(SpecError, "E210", message, self.span or param.shape[0].span)
        return tuple(shape)

    def _stored(self, param: ParamRule, shape: tuple[int, ...]) -> tuple[int, ...]:
        """At a stack of experts: all experts' tensors in one, side by side along an axis or in front."""
        count, axis = self.place.count, stacked_axis(param)
        if count == 1 or param.shared:
            return shape
        if axis is None:
            return (count, *shape)
        return (*shape[:axis], shape[axis] * count, *shape[axis + 1 :])

    def _init(self, expr: tree.Expr, shape: tuple[int, ...], shapes: Shapes) -> Init | Derived:
        while isinstance(expr, tree.Conditional):
            expr = expr.then if self.scalar(expr.test) else expr.otherwise
        name = initialiser(expr)
        if not name:
            matrix = self._known_bias(expr, expr)
            self._measured(matrix, shape, shapes)
            return Derived(matrix, self._scalars_of(matrix))
        given = match_arguments(expr)
        arguments: list[tuple[str, float | str | tuple[int, ...]]] = []
        for argument, default in INITIALISERS[name]:
            value = self.scalar(given[argument]) if argument in given else default
            if value is None and default is not None:
                value = default
            if value is None and name in TYPED:
                what = {"text": "the tokens of a text", "ints": "a list of numbers"}[TYPED[name]]
                message = f"'{self.rule.name}' starts from {what}, and there is none"
                fail(SpecError, "E216", message, self.span, help=f"give it: {expression.text(given[argument])} = ...")
            if isinstance(value, tuple) and len(value) != math.prod(shape):
                message = f"'{self.rule.name}' takes {math.prod(shape)} numbers there, and "
                message += f"{expression.text(given[argument])} has {len(value)}"
                fail(SpecError, "E216", message, self.span)
            if isinstance(value, str | tuple):
                arguments.append((argument, value))
                continue
            assert isinstance(value, int | float), value
            arguments.append((argument, float(value)))
        return Init(name, tuple(arguments))


def _numbered(key: str, group: int | str | None) -> str:
    return key if group is None else f"{key}.{group}"


def stacked_axis(param: ParamRule) -> int | None:
    """The axis along which a stack of experts puts its tensors side by side; None: in front, on an axis of their own.

    PEFT knows matrices with one side of the weight and one size of the method's own, and multiplies that one.
    """
    own = [axis for axis, each in enumerate(param.shape) if each not in (tree.Name("in"), tree.Name("out"))]
    return own[0] if len(param.shape) == 2 and len(own) == 1 else None
