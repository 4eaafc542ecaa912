"""Many module names as a few selectors a person can read."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$")


def collapse(names: Iterable[str]) -> tuple[str, ...]:
    """`a.0.q, a.0.v, a.1.q, a.1.v` -> `a[0..2].{q, v}`: each name is in exactly one of the selectors."""
    indices: dict[str, dict[tuple[int, ...], None]] = {}
    for name in names:
        template = _NUMBER.sub("#", name)
        numbers = tuple(int(each) for each in _NUMBER.findall(name))
        indices.setdefault(template, {})[numbers] = None
    filled: dict[str, None] = {}
    for template, found in indices.items():
        for each in _filled(template, list(found)):
            filled[each] = None
    return _joined(list(filled))


PLACES = {"@prompt": "the embedded text", "@cache": "the keys and values of every layer"}
"""How places of a model that no module has are called."""


def places(names: Iterable[str]) -> tuple[str, ...]:
    """As `collapse`, and what is no module's name in words."""
    return tuple(PLACES.get(each, each) for each in collapse(names))


def _filled(template: str, numbers: Sequence[tuple[int, ...]]) -> list[str]:
    axes = [sorted({each[axis] for each in numbers}) for axis in range(template.count("#"))]
    size = 1
    for axis in axes:
        size *= len(axis)
    if size != len(numbers):  # no full grid: a list for the last number only
        grouped: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for each in numbers:
            grouped.setdefault(each[:1], []).append(each)
        if len(grouped) == 1:
            return [_written(template, [[number] for number in each]) for each in numbers]
        return [text for group in grouped.values() for text in _filled(template, group)]
    return [_written(template, axes)]


def _written(template: str, axes: Sequence[Sequence[int]]) -> str:
    text = template
    for axis in axes:
        shown = f"[{_ranges(axis)}]"
        text = text.replace(".#", shown, 1) if ".#" in text else text.replace("#", shown, 1)
    return text


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for each in numbers:
        if runs and each == runs[-1][-1] + 1:
            runs[-1].append(each)
        else:
            runs.append([each])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1] + 1}" for run in runs)


def _joined(names: Sequence[str]) -> tuple[str, ...]:
    """Names that differ in their last part only, with that part in braces."""
    leaves: dict[str, list[str]] = {}
    for each in names:
        parent, dot, leaf = each.rpartition(".")
        leaves.setdefault(parent + dot, []).append(leaf)
    return tuple(
        parent + (found[0] if len(found) == 1 else f"{{{', '.join(found)}}}") for parent, found in leaves.items()
    )
