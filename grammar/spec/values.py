"""Values for hyperparameters: a spec's arguments, evaluated and checked against their types."""

from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.infer import Scalar, type_of
from peftc.grammar.method.rule import MethodRule, Value, Values
from peftc.grammar.method.scalar import evaluate
from peftc.grammar.peft_words import instead_of
from peftc.grammar.spec.peft_help import for_field
from peftc.grammar.syntax import expression, tree


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
            help = for_field(rule, argument.name) or did_you_mean(argument.name, known) or listed
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
        case tuple(), "ints":
            return value
        case str(), "text":
            if not hyperparameter.choices or value in hyperparameter.choices:
                return value
            listed = ", ".join(map(expression.quoted, hyperparameter.choices))
            help = did_you_mean(value, hyperparameter.choices) or f"it is one of {listed}"
            fail(SpecError, "E151", f"{expression.quoted(value)} is not a choice for '{name}'", place.span, help=help)
        case _:
            pass
    written = expression.text(expression.literal(value))
    help = instead_of(name) if isinstance(value, str) else ""
    fail(SpecError, "E142", f"'{name}' is {Scalar(wanted)}, and {written} is not", place.span, help)
