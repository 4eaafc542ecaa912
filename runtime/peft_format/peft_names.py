"""PEFT's ways to name modules, as selectors and back: suffixes, regular expressions, layer indices."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from peftc.grammar.syntax import tree

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INDEX = re.compile(r"0|[1-9][0-9]*")

V = TypeVar("V", bound=Hashable)


def suffix_selector(name: str) -> tree.Selector:
    """A dotted suffix: `self_attn.q_proj`, or a regular expression of the same meaning for names no path can spell."""
    return _path(name) or tree.PatternSelector(rf"(.*\.)?{re.escape(name)}")


def ending_selector(name: str) -> tree.Selector:
    """A name of modules_to_save: the end of a module's name, dotted or not, so that `norm` is `input_layernorm` too."""
    return tree.PatternSelector(f".*{re.escape(name)}")


def pattern_key_selector(key: str) -> tree.Selector:
    """A key of rank_pattern or alpha_pattern: `re.match(rf"(.*\\.)?({key})$", name)`; plain names become paths."""
    return _path(key) or tree.PatternSelector(rf"(.*\.)?({key})")


def layered_selector(names: Sequence[str], layers: Sequence[int], patterns: Sequence[str]) -> tree.Selector:
    """Suffixes limited to layers, as PEFT reads layers_to_transform.

    The layer of a name is its first numbered segment (after two others), or the first one behind a segment that
    matches one of `patterns`, the first pattern that occurs at all deciding. Names given exactly are not limited.
    """
    exact = "|".join(re.escape(each) for each in names)
    return tree.PatternSelector(rf"{exact}|(?=.*\.(?:{exact})\Z){_limit(layers, patterns)}.*")


def beyond_layers(layers: Sequence[int], patterns: Sequence[str]) -> tree.Selector:
    """What is in none of the layers, as `layered_selector` tells them."""
    return tree.PatternSelector(rf"(?!{_limit(layers, patterns)}).*")


def _limit(layers: Sequence[int], patterns: Sequence[str]) -> str:
    """What a name in one of the layers begins with."""
    index = f"0*(?:{'|'.join(str(each) for each in layers)})"
    if patterns:
        limits, passed = [], ""
        for pattern in patterns:
            limits.append(rf"{passed}(?:(?!(?:{pattern})\.\d+\.)[^.]*\.)*(?:{pattern})\.{index}\.")
            passed += rf"(?!(?:.*\.)?(?:{pattern})\.\d+\.)"
        return f"(?:{'|'.join(limits)})"
    return rf"[^.]*\.[^.]*(?:\.(?!\d+\.)[^.]*)*\.{index}\."


def minimal_suffixes(chosen: Sequence[str], names: Iterable[str]) -> tuple[str, ...] | None:
    """The shortest dotted suffixes that match all of `chosen` and nothing else in `names`.

    None when that cannot be said: a chosen name is itself the suffix of one that was not chosen.
    """
    wanted = set(chosen)
    taken = {suffix for name in names if name not in wanted for suffix in suffixes(name)}
    found: dict[str, None] = {}
    for name in chosen:
        suffix = next((each for each in suffixes(name) if each not in taken), None)
        if suffix is None:
            return None
        found[suffix] = None
    return tuple(sorted(found))


def minimal_endings(chosen: Sequence[str], names: Iterable[str], adapted: Iterable[str]) -> tuple[str, ...] | None:
    """The same for modules_to_save, where PEFT compares the ends of strings and keeps adapters out of what matched."""
    wanted = set(chosen)
    others = [name for name in names if name not in wanted]
    sites = tuple(adapted)

    def fits(ending: str) -> bool:
        inside = re.compile(rf"(^|.*\.){ending}($|\..*)")
        return not any(name.endswith(ending) for name in others) and not any(inside.match(site) for site in sites)

    found: dict[str, None] = {}
    for name in chosen:
        ending = next((each for each in suffixes(name) if each in found or fits(each)), None)
        if ending is None:
            return None
        found[ending] = None
    return tuple(sorted(found))


def value_pattern(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The commonest value, and keys for PEFT's pattern fields that give every other name its own."""
    default = Counter(values.values()).most_common(1)[0][0]
    taken: dict[str, set[V]] = {}
    for name, value in values.items():
        for suffix in suffixes(name):
            taken.setdefault(suffix, set()).add(value)
    plain: dict[str, V] = {}
    for name, value in values.items():
        if value != default:
            own = (each for each in suffixes(name) if taken[each] == {value})
            plain[next(own, f"^{re.escape(name)}")] = value
    if all(_pattern_value(plain, name, default) == value for name, value in values.items()):
        return default, plain
    # A dot that stands for any character reached too far: spell every name out.
    exact = {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
    return default, exact


def suffixes(name: str) -> tuple[str, ...]:
    """The dotted suffixes of a name, shortest first, itself last."""
    parts = name.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def _pattern_value(pattern: Mapping[str, V], name: str, default: V) -> V:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _path(name: str) -> tree.PathSelector | None:
    segments: list[tree.Segment] = []
    for part in name.split("."):
        if _NAME.fullmatch(part):
            segments.append(tree.Segment((part,)))
        elif _INDEX.fullmatch(part) and segments and segments[-1].indices is None:
            segments[-1] = tree.Segment(segments[-1].names, indices=(tree.Index(int(part)),))
        else:
            return None
    return tree.PathSelector(tuple(segments))
