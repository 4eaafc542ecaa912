"""How transformers says what earlier releases called a model's weights, and which of them are one weight today.

Its conversions are handed over: objects with patterns of names, and some with operations on the weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

_STACK, _JOIN = ("MergeModulelist", 0), ("Concatenate", 1)
_RENAMED = "_checkpoint_conversion_mapping"
EXPERT = "*."
"""Stands in a pattern for the number of an expert, and the dot behind it."""


def renamings(conversions: Iterable[Any]) -> list[Any]:
    """Those that rename weights and leave them as they are."""
    return [each for each in conversions if not hasattr(each, "operations")]


def converters(conversions: Iterable[Any]) -> list[Any]:
    """Those that make other weights of weights."""
    return [each for each in conversions if hasattr(each, "operations")]


def stacked(converter: Any) -> Sequence[str]:
    """The patterns of weights that are stacked by their numbers, all of one below those of another.

    Empty where that is not what the conversion does.
    """
    done = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    patterns: Sequence[str] = converter.source_patterns
    fits = done == [_STACK, _JOIN] or (done == [_STACK] and len(patterns) == 1)
    return tuple(patterns) if fits and all(each.count(EXPERT) == 1 for each in patterns) else ()


def own_renamings(model: object) -> dict[str, str]:
    """What a model's class says by itself, as those of transformers 4 do: regular expressions and replacements."""
    said = getattr(model, _RENAMED, None)
    return dict(said) if isinstance(said, dict) else {}
