"""Statements as units of text: one clause, item, header or closing brace each, with the place it came from."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from peftc.grammar.syntax import expression, tree

WIDTH = 100
INDENT = "    "

# A place where a long line may break.
_BREAK = "\0"
ALIGNED = 40  # longer initialisers do not push what follows to the right

# A name that could go on from the value before it needs a comma between.
_KEYWORDS = frozenset(
    ("on", "refine", "skip", "train", "bias", "tokens", "with", "where", "for", "param", "let", "default", "peft")
) | {"saved", "if", "else", "and", "or", "not", "use", "base", "adapter", "activate", "route", "method", "all"}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DIGITS = re.compile(r"[0-9]+")


@dataclass
class Unit:
    """A line (or a wrapped one) and the range of source it stands for; (-1, -1) when there is no source."""

    kind: Literal["open", "close", "item", "whole"]
    lines: list[str]
    node: tree.Node | None = None
    start: int = -1
    end: int = -1
    leading: list[tuple[str, bool]] = field(default_factory=list)  # comments, and whether a blank line goes before
    trailing: str = ""
    blank: bool = False


def lay_out(statement: tree.Statement) -> list[Unit]:
    """The units of a statement, in order."""
    match statement:
        case tree.Use(path):
            return [_whole(f"use {expression.quoted(path)}", statement)]
        case tree.Activate(terms):
            return [_whole(f"activate {_sum(terms)}", statement)]
        case tree.Route(name):
            return [_whole(f"route = {name}", statement)]
        case tree.Base(entries):
            width = max((len(each.name) for each in entries), default=0)
            texts = [f"{each.name:<{width}} = {expression.text(each.value)}" for each in entries]
            for position, each in enumerate(entries[1:]):
                texts[position] += "," if each.name in _KEYWORDS else ""
            items = [_item(each, text) for each, text in zip(entries, texts, strict=True)]
            return _block("base", statement, items) if items else [_whole("base { }", statement)]
        case tree.Adapter(name, method, clauses):
            given = [expression.arguments((each,)) for each in method.arguments]
            head = f"adapter {label(name)} = {method.function}"
            head += f"({_list(given)})" if given else ""
            if not clauses:
                return [_whole(head, statement)]
            width = max(len(_keyword(each)) for each in clauses)
            return _block(head, statement, [_item(each, _clause(each, width)) for each in clauses])
        case tree.Combined(name, adapters, options):
            parts = [*(label(each.id) for each in adapters), *(expression.arguments((each,)) for each in options)]
            return [_whole(f"adapter {label(name)} = combine({_list(parts)})", statement)]
        case tree.Method(name, hyperparameters, items):
            head = f"method {name}({_list([_hyperparameter(each) for each in hyperparameters])})"
            return _block(head, statement, _items(items))


def label(name: str) -> str:
    """An adapter's or architecture's name, quoted where it has to be."""
    return name if _NAME.fullmatch(name) else expression.quoted(name)


def selector(node: tree.Selector) -> str:
    """A selector as it is written."""
    match node:
        case tree.AllSelector(kind):
            return f"all {kind}"
        case tree.PatternSelector(pattern):
            return _pattern(pattern)
        case tree.PathSelector(segments):
            return ".".join(_segment(each, first=position == 0) for position, each in enumerate(segments))


def _whole(text: str, node: tree.Node) -> Unit:
    return Unit("whole", _wrap(text, ""), node)


def _item(node: tree.Node, text: str) -> Unit:
    lines = [line for part in text.split("\n") for line in _wrap(part, INDENT)]
    return Unit("item", lines, node)


def _block(head: str, node: tree.Node, items: list[Unit]) -> list[Unit]:
    return [Unit("open", _wrap(f"{head} {{", ""), node), *items, Unit("close", ["}"], node)]


def _wrap(text: str, indent: str) -> list[str]:
    if len(indent) + len(text) <= WIDTH:
        return [indent + text.replace(_BREAK, " ")]
    lines: list[str] = []
    line = indent
    for part in text.split(_BREAK):
        if line.strip() and len(line) + 1 + len(part) > WIDTH:
            lines.append(line.rstrip())
            line = f"{indent}{INDENT}{part}"
        else:
            line = f"{line} {part}" if line.strip() else line + part
    return [*lines, line]


def _list(parts: Iterable[str]) -> str:
    return f",{_BREAK}".join(parts)


# --- clauses ---


def _keyword(clause: tree.Clause) -> str:
    match clause:
        case tree.OnClause():
            return "on"
        case tree.RefineClause():
            return "refine"
        case tree.SkipClause():
            return "skip"
        case tree.TrainClause():
            return "train"
        case tree.BiasClause():
            return "bias"
        case tree.TokensClause():
            return "tokens"


def _clause(clause: tree.Clause, width: int) -> str:
    head = f"{_keyword(clause):<{width}} "
    match clause:
        case tree.BiasClause(mode):
            return head + mode
        case tree.TokensClause(tokens, modules):
            where = f"{_BREAK}in {_list(map(selector, modules))}" if modules else ""
            return f"{head}[{_list(expression.text(each) for each in tokens)}]{where}"
        case tree.TrainClause(selectors, tied):
            return head + _list(map(selector, selectors)) + (f"{_BREAK}tied" if tied else "")
        case tree.SkipClause(selectors, where):
            return head + _list(map(selector, selectors)) + _where(where)
        case tree.OnClause(selectors, where, overrides) | tree.RefineClause(selectors, where, overrides):
            given = _list(expression.arguments((each,)) for each in overrides)
            return head + _list(map(selector, selectors)) + _where(where) + (f"{_BREAK}with {given}" if given else "")


def _where(where: tree.Expr | None) -> str:
    return "" if where is None else f"{_BREAK}where {expression.text(where)}"


def _sum(terms: Sequence[tree.ActivateTerm]) -> str:
    text = ""
    for term in terms:
        size = abs(term.weight)
        factor = (
            "" if size == 1 else f"{expression.number(int(size) if size.is_integer() and size < 1e15 else size)} * "
        )
        sign = "-" if term.weight < 0 else "+"
        written = factor + label(term.adapter)
        if text:
            text += f"{_BREAK}{sign} {written}"
        else:
            text = f"-{written}" if sign == "-" else written
    return text


# --- selectors ---


def _segment(segment: tree.Segment, first: bool) -> str:
    if segment.deep:
        return "**"
    if not segment.names:
        written = "*"
    elif len(segment.names) == 1 and _bare(segment, first):
        written = segment.names[0]
    else:
        parts = (each if _plain(each) else expression.quoted(each) for each in segment.names)
        written = f"{{{', '.join(parts)}}}"
    if segment.indices is None:
        return written
    return f"{written}[{', '.join(map(_index, segment.indices)) or '*'}]"


def _bare(segment: tree.Segment, first: bool) -> bool:
    name = segment.names[0]
    if _DIGITS.fullmatch(name):
        return segment.indices is None
    return _NAME.fullmatch(name) is not None and not (first and name == "all")


def _plain(name: str) -> bool:
    return bool(_NAME.fullmatch(name) or _DIGITS.fullmatch(name))


def _index(index: tree.Index) -> str:
    start = "" if index.start is None else str(index.start)
    stop = "" if index.stop is None else str(index.stop)
    return f"{start}..{stop}" if index.is_range else start


def _pattern(pattern: str) -> str:
    """Backslashes stay as they are, for a regular expression is full of them."""

    def one(match: re.Match[str]) -> str:
        found = match.group()
        if found.endswith('"'):
            return '\\"'
        return found if len(found) == 2 else f"\\x{ord(found):02x}"

    return '"' + re.sub(r'\\[^\x00-\x08\x0a-\x1f]|["\x00-\x08\x0a-\x1f]', one, pattern) + '"'


# --- methods ---


def _hyperparameter(item: tree.Hyperparameter) -> str:
    choices = f"({', '.join(map(expression.quoted, item.choices))})" if item.choices else ""
    return f"{item.name}: {item.type}{choices} = {expression.text(item.default)}"


def _items(items: Sequence[tree.MethodItem]) -> list[Unit]:
    words = {
        tree.KindsItem: "on",
        tree.DefaultItem: "default",
        tree.DefaultAsItem: "default",
        tree.ParamItem: "param",
        tree.ConstItem: "const",
        tree.LetItem: "let",
        tree.RequireItem: "require",
        tree.PrimeItem: "W'",
        tree.AllocateItem: "allocate",
        tree.CopiesItem: "copies",
        tree.RowsItem: "rows",
        tree.UnreadItem: "unread",
        tree.PeftItem: "peft",
    }
    width = max((len(words[type(each)]) for each in items), default=0)
    params = [each for each in items if isinstance(each, tree.ParamItem | tree.ConstItem)]
    heads = max((len(_param_head(each)) for each in params), default=0)
    written = [len(expression.text(each.init)) for each in params]
    inits = max((each for each in written if each <= ALIGNED), default=0)
    units: list[Unit] = []
    for item in items:
        word = f"{item.target}'" if isinstance(item, tree.PrimeItem) else words[type(item)]
        head = f"{word:<{width}} "
        if isinstance(item, tree.ParamItem | tree.ConstItem) and item.shared:
            head = f"shared {head}"
        match item:
            case tree.KindsItem(kinds):
                text = _list(kinds)
            case tree.DefaultAsItem(method):
                text = f"as {method}"
            case tree.RequireItem(test):
                text = expression.text(test)
            case tree.ConstItem():
                text = f"{_param_head(item):<{heads}} = {expression.text(item.init):<{inits}}{_BREAK}{_stored(item)}"
                text += _condition(item)
            case tree.DefaultItem(targets, architectures, overrides):
                text = f"{_list(map(_target, targets))}{_BREAK}for {_list(map(_target, architectures))}"
                text += (
                    f"{_BREAK}with {_list(expression.arguments((each,)) for each in overrides)}" if overrides else ""
                )
            case tree.ParamItem():
                text = f"{_param_head(item):<{heads}} = {expression.text(item.init):<{inits}}{_BREAK}"
                text += f"saved {expression.quoted(item.saved)}" + " with kernel" * item.kernel
                text += "" if item.group is None else f" by {expression.before_if(item.group)}"
                for each in item.variants:
                    text += f"\n{INDENT}on {each.kind} = {expression.text(each.init)} "
                    text += f"saved {expression.quoted(each.saved)}"
                text += _condition(item)
            case tree.LetItem(name, value, saved):
                text = f"{name} = {expression.text(value)}"
                text += f"{_BREAK}saved {expression.quoted(saved)}" if saved else ""
            case tree.PrimeItem(_, value):
                text = f"= {expression.text(value)}"
            case tree.AllocateItem(vector, partners, settings):
                given = _list(expression.arguments((each,)) for each in settings)
                text = f"{vector} with {_list(partners)} " + (f"{{ {given} }}" if given else "{ }")
            case tree.CopiesItem(saved) | tree.RowsItem(saved):
                text = f"saved {expression.quoted(saved)}"
            case tree.UnreadItem(keys):
                text = _list(map(expression.quoted, keys))
            case tree.PeftItem(type_name, fields):
                given = _list(map(_field, fields))
                text = f"{type_name} {{ {given} }}" if given else f"{type_name} {{ }}"
        units.append(_item(item, head + text))
    return units


def _param_head(item: tree.ParamItem | tree.ConstItem) -> str:
    return f"{item.name}[{', '.join(map(expression.text, item.shape))}]"


def _stored(item: tree.ConstItem) -> str:
    parts = []
    if item.saved is not None:
        when = "" if item.saved_when is None else f" when {expression.before_if(item.saved_when)}"
        parts.append(f"saved {expression.quoted(item.saved)}{when}")
    if item.seed is not None:
        parts.append(f"seeded {expression.before_if(item.seed)}")
    if item.once:
        parts.append("once")
    by = "" if item.group is None else f" by {expression.before_if(item.group)}"
    return (" ".join(parts) or "recomputed") + by


def _condition(item: tree.ParamItem | tree.ConstItem) -> str:
    return "" if item.condition is None else f" if {expression.text(item.condition)}"


def _field(field: tree.PeftField) -> str:
    by = f" by {field.pattern}" if field.pattern else ""
    return f"{field.name} = {expression.text(field.value)}{by}"


def _target(name: str) -> str:
    return name if all(_NAME.fullmatch(each) for each in name.split(".")) else expression.quoted(name)
