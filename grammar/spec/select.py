"""Selectors met with a model's names: which sites and modules they choose."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.method.rule import KINDS, Value
from peftc.grammar.method.scalar import evaluate
from peftc.grammar.syntax import tree

NUMBER = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True)
class Candidate:
    """A site as selectors see it: its name, its kind and the sizes of its weight."""

    name: str
    kind: str
    in_features: int
    out_features: int
    output: bool = False
    attention: str | None = None  # the MultiheadAttention it is a projection of, whose name chooses it too

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names it is chosen by."""
        return (self.name, self.attention) if self.attention else (self.name,)

    def is_a(self, kind: str) -> bool:
        """Whether it is of a kind; the output projection of a MultiheadAttention is of two."""
        return kind == self.kind or (kind == "multihead_attention" and self.attention is not None)


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
                if NUMBER.fullmatch(part) and len(part) < 10:
                    container = ".".join(parts[:end])
                    lengths[container] = max(lengths.get(container, 0), int(part) + 1)
        return lengths

    @cached_property
    def candidate_parts(self) -> tuple[tuple[str, ...], ...]:
        """The names that choose a candidate, split: each candidate's own, and other spellings."""
        return tuple(parts for _, parts in self.spelled)

    @cached_property
    def spelled(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """Every spelling of a candidate's name, split, behind the candidate's index."""
        return tuple(
            (index, tuple(name.split("."))) for index, each in enumerate(self.candidates) for name in each.spellings
        )

    @cached_property
    def by_leaf(self) -> Mapping[str, tuple[tuple[int, tuple[str, ...]], ...]]:
        """The same by the last part of the name."""
        found: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
        for index, parts in self.spelled:
            found.setdefault(parts[-1], []).append((index, parts))
        return {leaf: tuple(spelled) for leaf, spelled in found.items()}


def select(selector: tree.Selector, where: tree.Expr | None, universe: Universe) -> tuple[Candidate, ...]:
    """The candidates a selector chooses, in model order; empty when there are none."""
    return tuple(each for each in chosen(selector, universe) if where is None or holds(where, each))


def select_modules(selector: tree.Selector, universe: Universe) -> tuple[str, ...]:
    """All modules a selector names, in model order, containers and what they contain alike."""
    if isinstance(selector, tree.AllSelector):
        named = {each.name for each in chosen(selector, universe)}
        return tuple(each for each in universe.modules if each in named)
    return tuple(each for each in universe.modules if each and matches(selector, each, universe))


def matches(selector: tree.PathSelector | tree.PatternSelector, name: str, universe: Universe) -> bool:
    """Whether a path is a suffix of the name, or a pattern the whole of it."""
    if isinstance(selector, tree.PatternSelector):
        return _compiled(selector.pattern).fullmatch(name) is not None
    return bool(reached(selector.segments, tuple(name.split(".")), universe))


def matches_inside(selector: tree.Selector, name: str, universe: Universe) -> bool:
    """Whether the selector names this, or a module that contains it."""
    if isinstance(selector, tree.AllSelector):
        return any(each.name == name for each in chosen(selector, universe))
    return any(matches(selector, each, universe) for each in _with_containers(name))


def holds(where: tree.Expr, candidate: Candidate) -> bool:
    """Whether a checked predicate is true of the candidate."""
    values: dict[str, Value] = {kind: candidate.is_a(kind) for kind in KINDS}
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
            if end < 2 or not NUMBER.fullmatch(parts[end - 1]):
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


def chosen(selector: tree.Selector, universe: Universe) -> Iterator[Candidate]:
    """The candidates a selector names, whatever its `where`, in model order."""
    match selector:
        case tree.AllSelector(kind):
            kinds = ("linear", "conv1d") if kind == "linear" else (kind,)
            yield from (each for each in universe.candidates if any(map(each.is_a, kinds)) and not each.output)
        case tree.PatternSelector(pattern):
            compiled = _compiled(pattern)
            yield from (each for each in universe.candidates if any(map(compiled.fullmatch, each.spellings)))
        case tree.PathSelector(segments):
            last = segments[-1]
            plain = last.names and last.indices is None and not last.deep
            spelled = (
                [each for name in last.names for each in universe.by_leaf.get(name, ())] if plain else universe.spelled
            )
            indices = {index for index, parts in spelled if reached(segments, parts, universe)}
            yield from (universe.candidates[index] for index in sorted(indices))


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
