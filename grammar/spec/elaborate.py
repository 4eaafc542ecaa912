"""From tree to spec: names resolved, values typed, files brought in. No model is needed."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.check import check_where
from peftc.grammar.method.rule import KINDS, MethodRule
from peftc.grammar.source import Source, Span
from peftc.grammar.spec.combined import WORD as COMBINE
from peftc.grammar.spec.combined import read_combined
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.methods_of import Loader, Methods, methods_of
from peftc.grammar.spec.peft_help import for_method
from peftc.grammar.spec.quantize import read_quantize
from peftc.grammar.spec.spec import (
    REGIONS,
    AdapterSpec,
    Base,
    CombinedAdapter,
    Regions,
    RouteName,
    Spec,
    Target,
    Tokens,
)
from peftc.grammar.spec.values import complete, partial
from peftc.grammar.syntax import expression, tree
from peftc.grammar.syntax.load import load_source
from peftc.grammar.syntax.parse import parse

MAX_NAME = 64

_TEXTS = ("architecture", "model_type", "regions")  # entries of `base` that are texts
_SETTINGS = ("quantize", "regions")  # those that say how the model is to be stored and run; others are demands

_S = TypeVar("_S", bound=tree.Statement)

_UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')


def read_spec(path_or_text: str | os.PathLike[str]) -> Spec:
    """The spec in a file (a path, or a string that ends in `.adapter` or names a file), or in the text itself."""
    source, directory = read_source(path_or_text)
    return elaborate(parse(source), source, directory=directory)


def read_methods(path_or_text: str | os.PathLike[str]) -> Mapping[str, MethodRule]:
    """The methods a file defines or brings in, checked; the file needs no adapter."""
    source, directory = read_source(path_or_text)
    return methods_of(parse(source), directory, load_source, builtin_methods()).own


def read_source(path_or_text: str | os.PathLike[str]) -> tuple[Source, Path | None]:
    """The text meant, and the directory it stands in if it is a file's."""
    if isinstance(path_or_text, str) and not names_file(path_or_text):
        return Source("<spec>", path_or_text), None
    return load_source(path_or_text), Path(path_or_text).parent


def elaborate(file: tree.File, source: Source, *, directory: Path | None = None, load: Loader = load_source) -> Spec:
    """The spec a file means. `directory` is where `use` looks; None for a text without a place. Raises SpecError."""
    methods = methods_of(file, directory, load, builtin_methods())
    named = [each for each in file.statements if isinstance(each, tree.Adapter | tree.Combined)]
    adapters: dict[str, AdapterSpec | CombinedAdapter] = {}
    for position, statement in enumerate(named):
        _check_name(statement)
        if statement.name in adapters:
            place = adapters[statement.name].span
            help = f"the other is in line {place.line}" if place else ""
            message = f"there are two adapters called '{statement.name}'"
            fail(SpecError, "E147", message, label_span(statement), help=help)
        if isinstance(statement, tree.Combined):
            later = {each.name: each.span for each in named[position + 1 :]}
            adapters[statement.name] = read_combined(statement, adapters, later)
        else:
            adapters[statement.name] = _adapter(statement, methods)
    if not adapters:
        help = "an adapter is written: adapter name = lora(rank = 8) { on q_proj }"
        fail(SpecError, "E148", "there is no adapter here", _start(source), help=help)
    single = tuple(each for each in adapters.values() if isinstance(each, AdapterSpec))
    combined = tuple(each for each in adapters.values() if isinstance(each, CombinedAdapter))
    active = _active(file, adapters)
    return Spec(single, active, _base(file), source, combined=combined, route=_route(file, active))


def label_span(statement: tree.Adapter | tree.Combined) -> Span | None:
    """Where the adapter's name stands."""
    if statement.span is None:
        return None
    source, start = statement.span.source, statement.span.start
    match = re.compile(r'adapter\s+("(?:[^"\\\n]|\\.)*"|\w+)').match(source.text, start)
    return Span(source, match.start(1), match.end(1)) if match else statement.span


def names_file(text: str) -> bool:
    """Whether a text is the name of a file, and not a spec itself: it ends in `.adapter`, or there is such a file."""
    if "\n" in text or len(text) > 4096:
        return False
    try:
        return text.endswith(".adapter") or Path(text).is_file()
    except (OSError, ValueError):
        return False


def _start(source: Source) -> Span:
    return Span(source, 0, 0)


def _check_name(statement: tree.Adapter | tree.Combined) -> None:
    name = statement.name
    reason = ""
    if not name:
        reason = "is empty"
    elif len(name) > MAX_NAME:
        reason = f"has {len(name)} characters, more than {MAX_NAME}"
    elif _UNSAFE.search(name):
        reason = "has a character that no directory name should have"
    elif name.startswith(".") or name.endswith((".", " ")) or name != name.strip():
        reason = "begins or ends with a dot or a space"
    if reason:
        shown = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
        message = f"the adapter name {expression.quoted(shown)} {reason}"
        help = "an adapter is saved in a directory of its name; use letters, digits, '_' and '-'"
        fail(SpecError, "E145", message, label_span(statement), help=help)


# --- adapters ---


def _adapter(statement: tree.Adapter, methods: Methods) -> AdapterSpec:
    call = statement.method
    rule = methods.known.get(call.function)
    if rule is None:
        _unknown_method(call, methods.known)
    on: list[Target] = []
    refine: list[Target] = []
    skip: list[Target] = []
    train: list[tree.Selector] = []
    tied: list[tree.Selector] = []
    tokens: list[Tokens] = []
    bias: Literal["none", "all", "adapter"] | None = None
    for clause in statement.clauses:
        match clause:
            case tree.OnClause():
                on.append(_target(rule, clause))
            case tree.RefineClause():
                refine.append(_target(rule, clause))
            case tree.SkipClause(selectors, where):
                _check_target(selectors, where)
                skip.append(Target(selectors, where, (), clause.span))
            case tree.TrainClause(selectors, ties):
                _check_named(selectors, "'train'")
                train += selectors
                tied += selectors if ties else ()
            case tree.BiasClause(mode):
                if bias is not None:
                    fail(SpecError, "E147", "'bias' is said twice", clause.span)
                bias = mode
            case tree.TokensClause(listed, modules):
                _check_named(modules, "'tokens ... in'")
                before = [token for each in tokens if each.modules == modules for token in each.tokens]
                tokens.append(Tokens(tuple(_tokens(listed, before)), modules, clause.span))
    return AdapterSpec(
        name=statement.name,
        rule=rule,
        values=complete(rule, call.arguments),
        on=tuple(on),
        refine=tuple(refine),
        skip=tuple(skip),
        train=tuple(train),
        tied=tuple(tied),
        bias=bias or "none",
        tokens=tuple(tokens),
        span=statement.span,
    )


def _unknown_method(call: tree.Call, known: Mapping[str, MethodRule]) -> NoReturn:
    span = call.span and Span(call.span.source, call.span.start, call.span.start + len(call.function))
    help = "" if call.function.lower() in known else for_method(call.function, known)
    help = help or did_you_mean(call.function, (*known, COMBINE)) or f"known methods: {', '.join(sorted(known))}"
    fail(SpecError, "E140", f"there is no method '{call.function}'", span, help=help)


def _target(rule: MethodRule, clause: tree.OnClause | tree.RefineClause) -> Target:
    _check_target(clause.selectors, clause.where)
    return Target(clause.selectors, clause.where, partial(rule, clause.overrides), clause.span)


def _check_target(selectors: tuple[tree.Selector, ...], where: tree.Expr | None) -> None:
    for each in selectors:
        if isinstance(each, tree.AllSelector) and each.kind not in KINDS:
            help = did_you_mean(each.kind, KINDS) or f"the kinds are {', '.join(KINDS)}"
            fail(SpecError, "E139", f"'{each.kind}' is not a kind of module", each.span, help=help)
    if where is not None:
        check_where(where)


def _check_named(selectors: tuple[tree.Selector, ...], what: str) -> None:
    for each in selectors:
        if isinstance(each, tree.AllSelector):
            help = "name them, or write a pattern"
            fail(SpecError, "E149", f"{what} takes modules by name, not by kind", each.span, help=help)


def _tokens(listed: tuple[tree.Text | tree.Number, ...], before: list[str | int]) -> list[str | int]:
    tokens: list[str | int] = []
    for each in listed:
        if each.value == "":
            fail(SpecError, "E159", "a token is not empty", each.span)
        value = each.value if isinstance(each, tree.Text) else int(each.value)
        if value in tokens or value in before:
            fail(SpecError, "E147", f"the token {expression.text(each)} is named twice", each.span)
        tokens.append(value)
    return tokens


# --- the rest of a file ---


def _active(file: tree.File, adapters: Mapping[str, object]) -> tuple[tuple[str, float], ...]:
    found = _only(file, tree.Activate, "activate")
    if found is None:
        return ((next(iter(adapters)), 1.0),) if len(adapters) == 1 else ()
    active: dict[str, float] = {}
    for term in found.terms:
        if term.adapter not in adapters:
            help = did_you_mean(term.adapter, adapters) or f"the adapters are {', '.join(adapters)}"
            fail(SpecError, "E146", f"there is no adapter called '{term.adapter}'", term.span, help=help)
        if term.adapter in active:
            fail(SpecError, "E147", f"'{term.adapter}' is activated twice", term.span)
        active[term.adapter] = term.weight
    return tuple(active.items())


def _route(file: tree.File, active: Collection[object]) -> RouteName | None:
    found = _only(file, tree.Route, "route")
    if found is None:
        return None
    if not active:
        help = "name them: activate a + b"
        fail(SpecError, "E164", f"route '{found.name}' has no active adapters to choose from", found.span, help=help)
    return RouteName(found.name, found.span)


def _base(file: tree.File) -> Base | None:
    found = _only(file, tree.Base, "base")
    if found is None:
        return None
    seen: set[str] = set()
    for each in found.entries:
        if each.name in seen:
            fail(SpecError, "E147", f"'{each.name}' is demanded twice", each.span)
        seen.add(each.name)
        if each.name in _TEXTS and not isinstance(each.value, tree.Text):
            help = f'as in {each.name} = "{each.value.id}"' if isinstance(each.value, tree.Name) else ""
            fail(SpecError, "E152", f"'{each.name}' is a text in double quotes", each.value.span, help)
        if each.name not in _SETTINGS:
            _check_entry(each)
    quantize = next((read_quantize(each) for each in found.entries if each.name == "quantize"), None)
    regions = next((_regions(each) for each in found.entries if each.name == "regions"), None)
    return Base(tuple(each for each in found.entries if each.name not in _SETTINGS), quantize, regions, found.span)


def _regions(entry: tree.BaseEntry) -> Regions:
    value = entry.value
    assert isinstance(value, tree.Text)
    for each in REGIONS:
        if each == value.value:
            return each
    shown = expression.text(value)
    help = did_you_mean(value.value, REGIONS) or f"it is one of {', '.join(REGIONS)}"
    fail(SpecError, "E151", f"{shown} is not a choice for 'regions'", value.span, help)


def _check_entry(entry: tree.BaseEntry) -> None:
    value = entry.value
    if isinstance(value, tree.Unary) and value.operator == "-":
        value = value.operand
    if not isinstance(value, tree.Number | tree.Text | tree.Flag | tree.Null):
        message = f"what '{entry.name}' must be is a number, a text, true, false or none"
        fail(SpecError, "E152", message, entry.value.span)


def _only(file: tree.File, kind: type[_S], word: str) -> _S | None:
    found = [each for each in file.statements if isinstance(each, kind)]
    if len(found) > 1:
        place = found[0].span
        help = f"the first is in line {place.line}" if place else ""
        fail(SpecError, "E147", f"a spec says '{word}' once", found[1].span, help=help)
    return found[0] if found else None
