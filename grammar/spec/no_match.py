"""Why a selector chooses nothing, and what is near."""

import re
from dataclasses import replace

from peftc.grammar.diagnostics import Diagnostic, nearest
from peftc.grammar.source import Span
from peftc.grammar.spec.select import NUMBER, Universe, chosen, matches, reached, select, select_modules, step
from peftc.grammar.syntax import layout, tree


def miss(selector: tree.Selector, where: tree.Expr | None, universe: Universe, *, modules: bool = False) -> Diagnostic:
    """Why a selector chooses nothing (E201), or nothing that `where` lets through (E202), and what is near.

    `modules` says that it names any module (`train`, `skip`), not only those with a weight to adapt.
    """
    found = misses(selector, where, universe, modules=modules)
    return found[0] if found else Diagnostic("E201", f"nothing matches '{_written(selector)}'", selector.span)


def misses(
    selector: tree.Selector, where: tree.Expr | None, universe: Universe, *, modules: bool = False
) -> tuple[Diagnostic, ...]:
    """Everything in a selector that chooses nothing, each alternative of `{a, b}` by itself; empty when all is well."""
    match selector:
        case tree.PathSelector():
            found = _path_misses(selector, universe, modules)
        case tree.PatternSelector(pattern):
            named = select_modules(selector, universe) if modules else ()
            found = () if named or any(chosen(selector, universe)) else (_pattern_miss(selector, pattern, universe),)
        case tree.AllSelector(kind):
            message = f"the model has no {kind} that an adapter can reach"
            found = () if any(chosen(selector, universe)) else (Diagnostic("E201", message, selector.span),)
    if found or where is None or modules or select(selector, where, universe):
        return found
    sizes = sorted({(each.kind, each.in_features, each.out_features) for each in chosen(selector, universe)})
    shown = ", ".join(f"{kind} of {columns} -> {rows}" for kind, columns, rows in sizes[:4])
    help = f"'{_written(selector)}' chooses {shown}{', ...' if len(sizes) > 4 else ''}"
    return (Diagnostic("E202", "no module that is selected satisfies the 'where'", where.span or selector.span, help),)


_Names = tuple[tuple[str, ...], ...]


def _path_misses(selector: tree.PathSelector, universe: Universe, modules: bool) -> tuple[Diagnostic, ...]:
    names = universe.candidate_parts
    if modules:
        names = (*(tuple(each.split(".")) for each in universe.modules if each), *names)
    if not _count(selector.segments, names, universe):
        return _suffix_misses(selector, names, universe)
    found: list[Diagnostic] = []
    for position, segment in enumerate(selector.segments):
        for name in segment.names if len(segment.names) > 1 else ():
            one = _with_names(selector.segments, position, (name,))
            if not any(reached(one, parts, universe) for parts in names):
                found += _suffix_misses(replace(selector, segments=one), names, universe)
    return tuple(found)


def _suffix_misses(selector: tree.PathSelector, names: _Names, universe: Universe) -> tuple[Diagnostic, ...]:
    """Take segments from the right until nothing is left: that one is wrong."""
    segments = selector.segments
    states = [(parts, frozenset({len(parts)})) for parts in names]
    for position in reversed(range(len(segments))):
        segment = segments[position]
        after = [(parts, step(segment, parts, left, universe)) for parts, left in states]
        after = [(parts, left) for parts, left in after if left]
        if after:
            states = after
            continue
        anywhere = replace(segment, indices=())
        if segment.indices and any(step(anywhere, parts, left, universe) for parts, left in states):
            return (_index_miss(segment, states, universe),)
        here = {parts[end - 1] for parts, left in states for end in left if end}
        if segment.indices is not None:
            numbered = [(parts, end - 1) for parts, left in states for end in left if end > 1]
            here = {parts[end - 1] for parts, end in numbered if NUMBER.fullmatch(parts[end])}
        if not segment.names:
            return (Diagnostic("E201", f"no module matches '{_written(selector)}'", segment.span or selector.span),)
        wrong = [name for name in segment.names if name not in here] or list(segment.names)
        return tuple(_name_miss(selector, position, name, here, names, universe) for name in wrong)
    return (Diagnostic("E201", f"no module matches '{_written(selector)}'", selector.span),)


def _name_miss(
    selector: tree.PathSelector, position: int, name: str, here: set[str], names: _Names, universe: Universe
) -> Diagnostic:
    segment = selector.segments[position]
    message = f"no module matches '{name}'"
    span = _name_span(segment, name) or selector.span
    close = nearest(name, here - {name}, limit=1) or nearest(name.lower(), here - {name}, limit=1)
    if close:
        count = _count(_with_names(selector.segments, position, close), names, universe)
        help = f"did you mean '{close[0]}'?"
        return Diagnostic(
            "E201", message, span, f"{help} ({count} module{'s' * (count != 1)} match{'es' * (count == 1)})"
        )
    if any(matches(tree.PathSelector((tree.Segment((name,)),)), each, universe) for each in universe.modules if each):
        if segment.indices is not None:
            return _list_miss(selector, position, name, span, names, universe)
        if position == len(selector.segments) - 1:
            inside = sorted({parts[-1] for parts in names if name in parts[:-1]})
            help = f"name what is inside: {_some(inside)}" if inside else ""
            return Diagnostic("E201", f"'{name}' has no weight that an adapter can reach", span, help)
        rest = _written(replace(selector, segments=selector.segments[position + 1 :]))
        owners = sorted(each for each in here if not NUMBER.fullmatch(each))
        return Diagnostic(
            "E201", f"'{name}' has no '{rest}'", span, f"'{rest}' is in: {_some(owners)}" if owners else ""
        )
    listed = sorted(each for each in here if not NUMBER.fullmatch(each))
    help = f"{'here the names are' if position else 'the names are'}: {_some(listed)}" if listed else ""
    return Diagnostic("E201", message, span, help)


def _list_miss(
    selector: tree.PathSelector, position: int, name: str, span: Span | None, names: _Names, universe: Universe
) -> Diagnostic:
    """An index into something that is no list, or a list whose entries do not hold the rest directly."""
    lengths = {each: size for each, size in universe.lengths.items() if each.rpartition(".")[2] == name}
    if not lengths:
        return Diagnostic("E201", f"'{name}' is not a list of modules", span, "leave out the brackets")
    before, rest = selector.segments[: position + 1], selector.segments[position + 1 :]
    message = f"no entry of '{name}' has '{_written(replace(selector, segments=rest))}' directly in it"
    deeper = replace(selector, segments=(*before, tree.Segment(deep=True), *rest))
    if _count(deeper.segments, names, universe):
        return Diagnostic("E201", message, span, f"did you mean '{_written(deeper)}'?")
    shown = [f"'{each}' has {size} entries, 0 to {size - 1}" for each, size in sorted(lengths.items())[:3]]
    return Diagnostic("E201", message, span, "; ".join(shown))


def _index_miss(
    segment: tree.Segment, states: list[tuple[tuple[str, ...], frozenset[int]]], universe: Universe
) -> Diagnostic:
    lists = {
        ".".join(parts[: end - 1])
        for parts, left in states
        for end in left
        if end > 1 and step(replace(segment, indices=()), parts, frozenset({end}), universe)
    }
    lengths = {each: universe.lengths.get(each, 0) for each in lists}
    shown = [f"'{name}' has {length} entries, 0 to {length - 1}" for name, length in sorted(lengths.items())[:3]]
    written = layout.selector(tree.PathSelector((segment,)))
    return Diagnostic("E201", f"no module matches '{written}'", segment.span, "; ".join(shown))


def _pattern_miss(selector: tree.PatternSelector, pattern: str, universe: Universe) -> Diagnostic:
    message = f"no module's whole name matches the pattern '{pattern}'"
    help = "a pattern matches the whole name"
    if universe.candidates:
        help += f", such as '{universe.candidates[0].name}'"
    return Diagnostic("E201", message, selector.span, help)


def _with_names(segments: tuple[tree.Segment, ...], position: int, names: tuple[str, ...]) -> tuple[tree.Segment, ...]:
    changed = replace(segments[position], names=names)
    return (*segments[:position], changed, *segments[position + 1 :])


def _count(segments: tuple[tree.Segment, ...], names: _Names, universe: Universe) -> int:
    return sum(1 for parts in set(names) if reached(segments, parts, universe))


def _name_span(segment: tree.Segment, name: str) -> Span | None:
    """Where one alternative stands within its segment."""
    if segment.span is None:
        return None
    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", segment.span.text)
    if found is None:
        return segment.span
    return Span(segment.span.source, segment.span.start + found.start(), segment.span.start + found.end())


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _written(selector: tree.Selector) -> str:
    return layout.selector(selector)
