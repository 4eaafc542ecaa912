"""The part of the syntax tree that specs and methods share: expressions and selectors."""

from dataclasses import dataclass, field
from typing import Literal

from peftc.grammar.source import Span


@dataclass(frozen=True)
class Node:
    """Anything written in a file; `span` is None only in trees built by a program (from an adapter_config.json)."""

    span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)


# --- expressions: hyperparameter values, initialisers, predicates and method bodies share one syntax ---


@dataclass(frozen=True)
class Number(Node):
    """`16`, `0.5`, `1e-4`."""

    value: int | float


@dataclass(frozen=True)
class Text(Node):
    """A quoted string."""

    value: str


@dataclass(frozen=True)
class Flag(Node):
    """`true` or `false`."""

    value: bool


@dataclass(frozen=True)
class Null(Node):
    """`none`."""


@dataclass(frozen=True)
class Name(Node):
    """A hyperparameter, parameter, `let`, dimension (`in`, `out`), kind, dtype, or `W` and `b`."""

    id: str


@dataclass(frozen=True)
class Sequence(Node):
    """`[a, b, c]`."""

    items: tuple["Expr", ...]


@dataclass(frozen=True)
class Argument(Node):
    """`value` or `name = value` in a call."""

    name: str | None
    value: "Expr"


@dataclass(frozen=True)
class Call(Node):
    """`kaiming_uniform(a = sqrt(5))`."""

    function: str
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Unary(Node):
    """`-x`, `not x`."""

    operator: Literal["-", "not"]
    operand: "Expr"


@dataclass(frozen=True)
class Binary(Node):
    """Arithmetic, `@`, comparisons, `and`, `or`."""

    operator: Literal["+", "-", "*", "/", "//", "%", "@", "**", "==", "!=", "<", "<=", ">", ">=", "and", "or"]
    left: "Expr"
    right: "Expr"


@dataclass(frozen=True)
class Transpose(Node):
    """`A.T`."""

    operand: "Expr"


@dataclass(frozen=True)
class Conditional(Node):
    """`a if test else b`; the test depends on hyperparameters only."""

    then: "Expr"
    test: "Expr"
    otherwise: "Expr"


Expr = Number | Text | Flag | Null | Name | Sequence | Call | Unary | Binary | Transpose | Conditional

# --- selectors ---


@dataclass(frozen=True)
class Index(Node):
    """One index `[3]` (stop is None, is_range False) or a half-open range `[a..b]`, `[-4..]`, `[..2]`."""

    start: int | None
    stop: int | None = None
    is_range: bool = False


@dataclass(frozen=True)
class Segment(Node):
    """One dotted part. `names` empty means `*`; `deep` means `**` (any depth, also none).

    `indices` None means no bracket; an empty tuple means `[*]`; otherwise any of the listed indices.
    `layers[3]` is the two name parts `layers` and `3`.
    """

    names: tuple[str, ...] = ()
    deep: bool = False
    indices: tuple[Index, ...] | None = None


@dataclass(frozen=True)
class PathSelector(Node):
    """A dotted suffix of a module or parameter name."""

    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class PatternSelector(Node):
    """A quoted regular expression, matched against the whole name (as PEFT does for a string target)."""

    pattern: str


@dataclass(frozen=True)
class AllSelector(Node):
    """`all linear`: every site of a kind but the output layer, as PEFT's "all-linear"."""

    kind: str


Selector = PathSelector | PatternSelector | AllSelector
