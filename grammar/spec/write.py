"""From spec to tree: what a person would have written. elaborate(to_tree(s)) == s up to spans."""

import itertools

from peftc.grammar.method.rule import MethodRule, ParamRule, Value, Values
from peftc.grammar.spec.combined import to_statement
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.quantize import to_expression
from peftc.grammar.spec.spec import AdapterSpec, Base, Spec, Target
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax import expression, tree


def to_tree(spec: Spec) -> tree.File:
    """The file of a spec: its own methods, the base, the adapters without what is default anyway, what is active."""
    statements: list[tree.Statement] = []
    builtin = builtin_methods()
    methods = {each.rule.name: each.rule for each in spec.adapters}
    statements += [_method(rule) for name, rule in methods.items() if builtin.get(name) != rule]
    if spec.base is not None:
        statements.append(_base(spec.base))
    statements += [_adapter(each) for each in spec.adapters]
    statements += [to_statement(each) for each in spec.combined]
    lone = len(spec.adapters) == 1 and not spec.combined and spec.active == ((spec.adapters[0].name, 1.0),)
    if spec.active and not lone:
        statements.append(tree.Activate(tuple(tree.ActivateTerm(weight, name) for name, weight in spec.active)))
    if spec.route is not None:
        statements.append(tree.Route(spec.route.name))
    return tree.File(tuple(statements))


def _base(base: Base) -> tree.Base:
    entries = list(base.entries)
    if base.quantize is not None:
        entries.append(tree.BaseEntry("quantize", to_expression(base.quantize)))
    if base.regions is not None:
        entries.append(tree.BaseEntry("regions", tree.Text(base.regions)))
    return tree.Base(tuple(entries))


def _adapter(spec: AdapterSpec) -> tree.Adapter:
    defaults = dict(complete(spec.rule, ()))
    given = tuple((name, value) for name, value in spec.values if value != defaults[name])
    clauses: list[tree.Clause] = [
        tree.OnClause(each.selectors, each.where, _arguments(each.overrides)) for each in spec.on
    ]
    clauses += [tree.RefineClause(*_refined(each)) for each in spec.refine]
    clauses += [tree.SkipClause(each.selectors, each.where) for each in spec.skip]
    for tied in (False, True):
        chosen = tuple(each for each in spec.train if (each in spec.tied) is tied)
        if chosen:
            clauses.append(tree.TrainClause(chosen, tied))
    if spec.bias != "none":
        clauses.append(tree.BiasClause(spec.bias))
    for each in spec.tokens:
        tokens = (tree.Text(token) if isinstance(token, str) else tree.Number(token) for token in each.tokens)
        clauses.append(tree.TokensClause(tuple(tokens), each.modules))
    return tree.Adapter(spec.name, tree.Call(spec.rule.name, _arguments(given)), tuple(clauses))


def _refined(target: Target) -> tuple[tuple[tree.Selector, ...], tree.Expr | None, tuple[tree.Argument, ...]]:
    return target.selectors, target.where, _arguments(target.overrides)


def _arguments(values: Values) -> tuple[tree.Argument, ...]:
    return tuple(tree.Argument(name, expression.literal(_short(value))) for name, value in values)


def _short(value: Value) -> Value:
    """`32`, not `32.0`: a hyperparameter's type makes it a float again."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return int(value) if whole and isinstance(value, float) else value


def _method(rule: MethodRule) -> tree.Method:
    items: list[tree.MethodItem] = [tree.KindsItem(rule.kinds)] if rule.kinds else []
    for found, group in itertools.groupby(rule.defaults, key=lambda each: each[1]):
        model_types = tuple(model_type for model_type, _ in group)
        items += [tree.DefaultItem(targets, model_types, _arguments(overrides)) for targets, overrides in found]
    params, lets = {each.role: each for each in rule.params}, dict(rule.lets)
    settled = dict([rule.settled])
    items += [
        tree.LetItem(name, lets[name], settled.get(name, "")) if name in lets else _tensor(params[name])
        for name in rule.order
    ]
    items += [tree.RequireItem(each) for each in rule.requires]
    if rule.weight is not None:
        items.append(tree.PrimeItem("W", rule.weight))
    if rule.bias is not None:
        items.append(tree.PrimeItem("b", rule.bias))
    if rule.prompt is not None:
        items.append(tree.PrimeItem("prompt", rule.prompt))
    if rule.gate is not None:
        items.append(tree.PrimeItem("gate", rule.gate))
    if rule.labels is not None:
        items.append(tree.PrimeItem("labels", rule.labels))
    if rule.allocation is not None:
        (vector, _), *partners = rule.allocation.axes
        settings = tuple(tree.Argument(name, value) for name, value in rule.allocation.settings)
        items.append(tree.AllocateItem(vector, tuple(role for role, _ in partners), settings))
    if rule.copies:
        items.append(tree.CopiesItem(rule.copies))
    if rule.rows:
        items.append(tree.RowsItem(rule.rows))
    if rule.unread:
        items.append(tree.UnreadItem(rule.unread))
    if rule.peft_type:
        items.append(tree.PeftItem(rule.peft_type, rule.peft_fields))
    return tree.Method(rule.name, rule.hyperparameters, tuple(items), rule.doc)


def _tensor(param: ParamRule) -> tree.ParamItem | tree.ConstItem:
    init, saved = dict(param.init), dict(param.saved)
    if not param.trained:
        return tree.ConstItem(
            param.role,
            param.shape,
            init[""],
            saved.get(""),
            param.saved_when,
            param.seed,
            once=param.once,
            shared=param.shared,
            group=param.group,
            condition=param.condition,
        )
    variants = tuple(tree.Variant(kind, init[kind], saved[kind]) for kind in init if kind)
    return tree.ParamItem(
        param.role,
        param.shape,
        init[""],
        saved[""],
        variants,
        kernel=param.kernel,
        shared=param.shared,
        group=param.group,
        condition=param.condition,
    )
