"""`adapter both = combine(a, b, weights = [0.7, 0.3])`: an adapter of others, read from a spec and written into one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.infer import Scalar, type_of
from peftc.grammar.method.scalar import evaluate
from peftc.grammar.source import Span
from peftc.grammar.spec.recipe import DRIVERS, KINDS, MAJORITIES, SUM, Recipe, like_kind
from peftc.grammar.spec.spec import CombinedAdapter, Part
from peftc.grammar.syntax import expression, tree

WORD = "combine"

_WEIGHTS, _WAY, _WIDE = "weights", "by", "svd_full_matrices"
# What an option is called, and where a recipe has it. PEFT's `svd_full_matrices` changes nothing of a combination.
_FIELDS = {
    _WAY: "kind",
    "density": "density",
    "majority_sign_method": "majority",
    "svd_rank": "rank",
    "svd_clamp": "clamp",
    "svd_driver": "driver",
}
OPTIONS = (_WEIGHTS, *_FIELDS, _WIDE)


def read_combined(
    statement: tree.Combined, before: Mapping[str, object], later: Mapping[str, Span | None]
) -> CombinedAdapter:
    """What a combination means, of adapters that stand before it; `later` are those behind it. Raises SpecError."""
    for position, each in enumerate(statement.adapters):
        if each.id not in before:
            _not_there(statement, each, before, later)
        if any(each.id == other.id for other in statement.adapters[:position]):
            help = "name it once, with the weight that it is to have"
            fail(SpecError, "E147", f"'{each.id}' is combined twice", each.span, help)
    if not statement.adapters:
        help = "name those it is made of: combine(a, b)"
        fail(SpecError, "E161", f"'{statement.name}' is a combination of no adapters", statement.span, help)
    given = _given(statement)
    weights = _weights(statement, given.get(_WEIGHTS))
    recipe = _recipe(statement, given)
    parts = (Part(each.id, weight, each.span) for each, weight in zip(statement.adapters, weights, strict=True))
    return CombinedAdapter(statement.name, tuple(parts), recipe, statement.span)


def to_statement(combined: CombinedAdapter) -> tree.Combined:
    """What a person would have written: the options that are not as they are by default."""
    options: list[tree.Argument] = []
    if any(each.weight != 1 for each in combined.parts):
        weights = (expression.literal(_short(each.weight)) for each in combined.parts)
        options.append(tree.Argument(_WEIGHTS, tree.Sequence(tuple(weights))))
    for option, field in _FIELDS.items():
        value = getattr(combined.recipe, field)
        if value != getattr(Recipe(), field):
            options.append(tree.Argument(option, expression.literal(_short(value))))
    return tree.Combined(combined.name, tuple(tree.Name(each.adapter) for each in combined.parts), tuple(options))


def _short(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def _not_there(
    statement: tree.Combined, name: tree.Name, before: Mapping[str, object], later: Mapping[str, Span | None]
) -> NoReturn:
    if name.id == statement.name:
        help = "name the adapters that it is made of"
        fail(SpecError, "E160", f"'{name.id}' would be made of itself", name.span, help)
    if name.id in later:
        place = later[name.id]
        help = f"it is defined in line {place.line}: write the combination behind that" if place else ""
        fail(SpecError, "E160", f"'{name.id}' is combined before it is defined", name.span, help)
    help = did_you_mean(name.id, before)
    if not help:
        help = f"the adapters before it are {', '.join(before)}" if before else "no adapter stands before it"
    fail(SpecError, "E146", f"there is no adapter called '{name.id}'", name.span, help)


def _given(statement: tree.Combined) -> dict[str, tree.Argument]:
    given: dict[str, tree.Argument] = {}
    for each in statement.options:
        assert each.name is not None, "the parser puts what has no name among the adapters"
        if each.name not in OPTIONS:
            help = did_you_mean(each.name, OPTIONS) or f"'{WORD}' takes {', '.join(OPTIONS)}"
            fail(SpecError, "E141", f"'{WORD}' has no option '{each.name}'", each.span, help)
        if each.name in given:
            fail(SpecError, "E143", f"'{each.name}' is given twice", each.span)
        given[each.name] = each
    return given


# --- weights ---


def _weights(statement: tree.Combined, given: tree.Argument | None) -> list[float]:
    """A weight for each adapter: one, unless they are said."""
    count = len(statement.adapters)
    if given is None:
        return [1.0] * count
    value = given.value
    if not isinstance(value, tree.Sequence):
        help = f"as in {_WEIGHTS} = [{', '.join(['0.5'] * count)}]"
        fail(SpecError, "E161", f"'{_WEIGHTS}' is a list of numbers, and this is not", value.span, help)
    if len(value.items) != count:
        adapters = f"{count} adapter{'s are' if count > 1 else ' is'}"
        message = f"{adapters} given {len(value.items)} weight{'' if len(value.items) == 1 else 's'}"
        fail(SpecError, "E161", message, value.span, "give each adapter one weight")
    return [_weight(each) for each in value.items]


def _weight(value: tree.Expr) -> float:
    found = _value(value)
    if not _is_number(found) or not math.isfinite(found):
        fail(SpecError, "E161", "a weight is a number, and this is not", value.span)
    return float(found)


# --- how they are combined ---


def _recipe(statement: tree.Combined, given: Mapping[str, tree.Argument]) -> Recipe:
    values = {_FIELDS[name]: _option(name, each.value) for name, each in given.items() if name in _FIELDS}
    recipe = Recipe(**values)
    if _WIDE in given:
        _option(_WIDE, given[_WIDE].value)
    # One adapter is its own sum, whatever is said.
    followed = replace(recipe, kind=SUM) if len(statement.adapters) == 1 else recipe
    if followed is not recipe and recipe.mix.dropped:
        message = f"'{_WAY}' is not read here: a lone adapter is summed, and nothing of it dropped"
        fail(SpecError, "E163", message, given[_WAY].span, f"leave out '{_WAY}' and its options, or combine several")
    for name, each in given.items():
        if name not in (_WEIGHTS, _WAY) and not followed.reads(name):
            alone = followed is not recipe and recipe.reads(name)
            why = "a lone adapter is summed" if alone else f"{_WAY} = {expression.quoted(recipe.kind)}"
            readers = ", ".join(kind for kind in KINDS if Recipe(kind).reads(name))
            help = "leave it out" if alone else f"leave it out, or combine by one of {readers}"
            fail(SpecError, "E163", f"'{name}' is not read here: {why}", each.span, help)
    found = recipe.fault()
    if found is not None:
        place = given[found.setting].value.span if found.setting else _place(statement, given)
        fail(SpecError, "E162", found.message, place, found.help)
    return recipe


def _place(statement: tree.Combined, given: Mapping[str, tree.Argument]) -> Span | None:
    return given[_WAY].span if _WAY in given else statement.span


def _option(name: str, value: tree.Expr) -> Any:
    """The value of an option, of the type that it has. Raises SpecError."""
    found = _value(value)
    if name in _WORDS:
        if not isinstance(found, str):
            help = f'as in {name} = "{value.id}"' if isinstance(value, tree.Name) else ""
            fail(SpecError, "E162", f"'{name}' is a text in double quotes, and this is not", value.span, help)
        if found not in _WORDS[name]:
            listed = like_kind(found) if name == _WAY else did_you_mean(found, _WORDS[name])
            help = listed or f"it is one of {', '.join(_WORDS[name])}"
            fail(SpecError, "E151", f"{expression.quoted(found)} is not a choice for '{name}'", value.span, help)
        return found
    wanted, fits = _TYPES[name]
    if not fits(found):
        fail(SpecError, "E162", f"'{name}' is {wanted}, and this is not", value.span)
    return int(found) if name == "svd_rank" else found


def _value(value: tree.Expr) -> Any:
    """The value of an expression without names; None for what has none."""
    if isinstance(value, tree.Name | tree.Null) or not isinstance(type_of(value, {}), Scalar):
        return None
    return evaluate(value, {})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()


_WORDS: Mapping[str, tuple[str, ...]] = {_WAY: KINDS, "majority_sign_method": MAJORITIES, "svd_driver": DRIVERS}
_TYPES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "density": ("a number", _is_number),
    "svd_rank": ("a whole number", _is_whole),
    "svd_clamp": ("a number", _is_number),
    _WIDE: ("true or false", lambda value: isinstance(value, bool)),
}
