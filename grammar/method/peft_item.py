"""A method's `peft` item: which field of an adapter_config.json is which hyperparameter, and how values translate."""

from collections.abc import Mapping, Sequence

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.method.infer import BOOL, Scalar, need, type_of, unknown_name
from peftc.grammar.method.rule import Value
from peftc.grammar.method.scalar import evaluate
from peftc.grammar.syntax import expression, tree

ANY = "any"  # a field that changes nothing here, whatever it says
MASKS = "masks"  # lists of which entries of a budgeted vector are kept, by parameter
TOKENS = "tokens"  # the ids of the tokens whose rows are trained
MODULES = "modules"  # a list of the modules at which a hyperparameter is true


def check_field(
    field: tree.PeftField,
    hyperparameters: Sequence[tree.Hyperparameter],
    budgeted: str = "",
    placed: Sequence[str] = (),
) -> set[str]:
    """The hyperparameters a field stands for. Raises SpecError (E13x) where it could not be read back.

    `budgeted` is the vector of the method's `allocate` item; `placed` are sizes of the place that a field may tell.
    """
    known = {each.name: each for each in hyperparameters}
    value = field.value
    if isinstance(value, tree.Name) and (value.id == ANY or (value.id == TOKENS and TOKENS not in known)):
        return set()
    if isinstance(value, tree.Name) and value.id in placed and value.id not in known:
        return set()
    masked = masked_vector(field)
    if masked:
        if masked != budgeted:
            message = f"'{MASKS}' takes the vector that an 'allocate' item before it names"
            fail(SpecError, "E158", message, value.span)
        return set()
    listed = listed_flag(field)
    if listed:
        if listed not in known or known[listed].type != "bool":
            fail(SpecError, "E158", f"'{MODULES}' takes a hyperparameter that is true or false", value.span)
        return {listed}
    names = names_in(value)
    for name in names:
        if name not in known:
            unknown_name(tree.Name(name, span=value.span), known)
    if isinstance(value, tree.Name) or not names:
        if not isinstance(value, tree.Name) and not _is_literal(value):
            _irreversible(value)
        return names
    if len(names) > 1 or not domain(known[next(iter(names))]):
        _irreversible(value)
    _check_branches(value, {each.name: Scalar(each.type, choices=each.choices) for each in hyperparameters})
    return names


def _check_branches(value: tree.Expr, names: Mapping[str, Scalar]) -> None:
    """The types of an expression whose branches may differ in theirs, as the values of a field in JSON do."""
    match value:
        case tree.Conditional(then, test, otherwise):
            need(test, type_of(test, names), BOOL, "a condition")
            _check_branches(then, names)
            _check_branches(otherwise, names)
        case tree.Null():
            pass
        case _:
            type_of(value, names)


def listed_flag(field: tree.PeftField) -> str:
    """The hyperparameter in `field = modules(flag)`; empty for other fields."""
    match field.value:
        case tree.Call("modules", (tree.Argument(None, tree.Name(name)),)):
            return name
        case _:
            return ""


def lists_tokens(field: tree.PeftField) -> bool:
    """Whether the field is `field = tokens`."""
    return isinstance(field.value, tree.Name) and field.value.id == TOKENS


def masked_vector(field: tree.PeftField) -> str:
    """The vector in `field = masks(vector)`; empty for other fields."""
    match field.value:
        case tree.Call("masks", (tree.Argument(None, tree.Name(name)),)):
            return name
        case _:
            return ""


def domain(hyperparameter: tree.Hyperparameter) -> tuple[Value, ...]:
    """All values it can have; empty where they cannot be listed."""
    return (False, True) if hyperparameter.type == "bool" else hyperparameter.choices


def translated(field: tree.PeftField, name: str, value: Value) -> Value:
    """What the field says when the hyperparameter it depends on has this value."""
    return evaluate(field.value, {name: value})


def constant(value: tree.Expr) -> Value:
    """The value of a literal; None for `none` and for anything that is not one."""
    match value:
        case tree.Number() | tree.Text() | tree.Flag():
            return value.value
        case tree.Unary("-", tree.Number() as number):
            return -number.value
        case _:
            return None


def names_in(expr: tree.Expr) -> set[str]:
    """The names a scalar expression depends on."""
    match expr:
        case tree.Name(name):
            return {name}
        case tree.Call(_, arguments):
            return {name for each in arguments for name in names_in(each.value)}
        case tree.Sequence(items):
            return {name for each in items for name in names_in(each)}
        case tree.Unary(_, operand) | tree.Transpose(operand):
            return names_in(operand)
        case tree.Binary(_, left, right):
            return names_in(left) | names_in(right)
        case tree.Conditional(then, test, otherwise):
            return names_in(then) | names_in(test) | names_in(otherwise)
        case _:
            return set()


def _is_literal(value: tree.Expr) -> bool:
    match value:
        case tree.Number() | tree.Text() | tree.Flag() | tree.Null() | tree.Unary("-", tree.Number()):
            return True
        case _:
            return False


def _irreversible(value: tree.Expr) -> None:
    help = "anything else could not be read back from an adapter_config.json"
    message = "a field's value is a hyperparameter, a literal, or decided by one hyperparameter that has choices"
    fail(SpecError, "E158", message, value.span, help=f"'{expression.text(value)}' is none of these: {help}")
