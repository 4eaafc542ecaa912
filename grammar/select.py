"""Selectors met with a model's names: which sites and modules they choose."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from peftc.grammar import layout, tree
from peftc.grammar.diagnostics import Diagnostic, SpecError, fail, nearest
from peftc.grammar.rule import KINDS, Value
from peftc.grammar.scalar import evaluate
from peftc.grammar.source import Span

_NUMBER = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True)
class Candidate:
    """A site as selectors see it: its name, its kind and the sizes of its weight."""

    name: str
    kind: str
    in_features: int
    out_features: int
    output: bool = False


@dataclass(frozen=True)
class Universe:
    """Everything a selector can name: the sites in model order, and the names of all modules."""

    candidates: tuple[Candidate, ...]
    modules: tuple[str, ...] = ()

    @cached_property
    def lengths(self) -> Mapping[str, int]:
        """The length of every list of modules: one more than the largest number among its children."""
        lengths: dict[str, int] = {}
        for name in (*self.modules, *(each.name for each in self.candidates)):
            parts = name.split(".")
            for end, part in enumerate(parts):
                if _NUMBER.fullmatch(part) and len(part) < 10:
                    container = ".".join(parts[:end])
                    lengths[container] = max(lengths.get(container, 0), int(part) + 1)
        return lengths

    @cached_property
    def candidate_parts(self) -> tuple[tuple[str, ...], ...]:
        """The candidates' names, split."""
        return tuple(tuple(each.name.split(".")) for each in self.candidates)

    @cached_property
    def by_leaf(self) -> Mapping[str, tuple[int, ...]]:
        """Candidates by the last part of their name."""
        found: dict[str, list[int]] = {}
        for index, parts in enumerate(self.candidate_parts):
            found.setdefault(parts[-1], []).append(index)
        return {leaf: tuple(indices) for leaf, indices in found.items()}


def select(selector: tree.Selector, where: tree.Expr | None, universe: Universe) -> tuple[Candidate, ...]:
    """The candidates a selector chooses, in model order; empty when there are none."""
    return tuple(each for each in _chosen(selector, universe) if where is None or holds(where, each))


def select_modules(selector: tree.Selector, universe: Universe) -> tuple[str, ...]:
    """All modules a selector names, in model order, containers and what they contain alike."""
    if isinstance(selector, tree.AllSelector):
        chosen = {each.name for each in _chosen(selector, universe)}
        return tuple(each for each in universe.modules if each in chosen)
    return tuple(each for each in universe.modules if each and matches(selector, each, universe))


def matches(selector: tree.PathSelector | tree.PatternSelector, name: str, universe: Universe) -> bool:
    """Whether a path is a suffix of the name, or a pattern the whole of it."""
    if isinstance(selector, tree.PatternSelector):
        return _compiled(selector.pattern).fullmatch(name) is not None
    return bool(reached(selector.segments, tuple(name.split(".")), universe))


def matches_inside(selector: tree.Selector, name: str, universe: Universe) -> bool:
    """Whether the selector names this, or a module that contains it."""
    if isinstance(selector, tree.AllSelector):
        return any(each.name == name for each in _chosen(selector, universe))
    return any(matches(selector, each, universe) for each in _with_containers(name))


def holds(where: tree.Expr, candidate: Candidate) -> bool:
    """Whether a checked predicate is true of the candidate."""
    values: dict[str, Value] = {kind: kind == candidate.kind for kind in KINDS}
    values |= {"in_features": candidate.in_features, "out_features": candidate.out_features}
    return bool(evaluate(where, values))


def reached(segments: tuple[tree.Segment, ...], parts: tuple[str, ...], universe: Universe) -> frozenset[int]:
    """How many parts may be left of a match: the segments, taken from the right, end there. Empty: no match."""
    left = frozenset({len(parts)})
    for segment in reversed(segments):
        left = step(segment, parts, left, universe)
        if not left:
            break
    return left


def step(segment: tree.Segment, parts: tuple[str, ...], left: frozenset[int], universe: Universe) -> frozenset[int]:
    """One segment of `reached`."""
    if segment.deep:
        return frozenset(range(max(left) + 1))
    result: set[int] = set()
    for end in left:
        if segment.indices is not None:
            if end < 2 or not _NUMBER.fullmatch(parts[end - 1]):
                continue
            end -= 1
            if not _indexed(segment.indices, int(parts[end][:10]), universe.lengths.get(".".join(parts[:end]), 0)):
                continue
        if end >= 1 and (not segment.names or parts[end - 1] in segment.names):
            result.add(end - 1)
    return frozenset(result)


def _indexed(indices: tuple[tree.Index, ...], position: int, length: int) -> bool:
    if not indices:
        return True
    for index in indices:
        if index.is_range:
            start, stop, _ = slice(index.start, index.stop).indices(length)
            if start <= position < stop:
                return True
        elif index.start is not None and position == (index.start + length if index.start < 0 else index.start):
            return True
    return False


def _chosen(selector: tree.Selector, universe: Universe) -> Iterator[Candidate]:
    match selector:
        case tree.AllSelector(kind):
            kinds = ("linear", "conv1d") if kind == "linear" else (kind,)
            yield from (each for each in universe.candidates if each.kind in kinds and not each.output)
        case tree.PatternSelector(pattern):
            compiled = _compiled(pattern)
            yield from (each for each in universe.candidates if compiled.fullmatch(each.name))
        case tree.PathSelector(segments):
            last = segments[-1]
            plain = last.names and last.indices is None and not last.deep
            indices = (
                sorted(index for name in last.names for index in universe.by_leaf.get(name, ()))
                if plain
                else range(len(universe.candidates))
            )
            for index in indices:
                if reached(segments, universe.candidate_parts[index], universe):
                    yield universe.candidates[index]


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    """The parser has compiled what comes from a text; a pattern from an adapter_config.json is compiled here first."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        fail(SpecError, "E149", f"'{pattern}' is not a regular expression: {error}")


def _with_containers(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


# --- when nothing is chosen ---


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
            found = () if named or any(_chosen(selector, universe)) else (_pattern_miss(selector, pattern, universe),)
        case tree.AllSelector(kind):
            message = f"the model has no {kind} that an adapter can reach"
            found = () if any(_chosen(selector, universe)) else (Diagnostic("E201", message, selector.span),)
    if found or where is None or modules or select(selector, where, universe):
        return found
    sizes = sorted({(each.kind, each.in_features, each.out_features) for each in _chosen(selector, universe)})
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
            here = {parts[end - 1] for parts, end in numbered if _NUMBER.fullmatch(parts[end])}
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
            return Diagnostic("E201", f"'{name}' is not a list of modules", span, "leave out the brackets")
        if position == len(selector.segments) - 1:
            inside = sorted({parts[-1] for parts in names if name in parts[:-1]})
            help = f"name what is inside: {_some(inside)}" if inside else ""
            return Diagnostic("E201", f"'{name}' has no weight that an adapter can reach", span, help)
        rest = _written(replace(selector, segments=selector.segments[position + 1 :]))
        owners = sorted(each for each in here if not _NUMBER.fullmatch(each))
        return Diagnostic(
            "E201", f"'{name}' has no '{rest}'", span, f"'{rest}' is in: {_some(owners)}" if owners else ""
        )
    listed = sorted(each for each in here if not _NUMBER.fullmatch(each))
    help = f"{'here the names are' if position else 'the names are'}: {_some(listed)}" if listed else ""
    return Diagnostic("E201", message, span, help)


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
