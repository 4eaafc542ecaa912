"""The parts of the syntax tree that say what starts active, and what weighs it."""

from dataclasses import dataclass

from peftc.grammar.syntax.syntax import Node


@dataclass(frozen=True)
class ActivateTerm(Node):
    """`0.5 * style`, one term of an `activate` sum."""

    weight: float
    adapter: str


@dataclass(frozen=True)
class Activate(Node):
    """`activate support + 0.5 * style`."""

    terms: tuple[ActivateTerm, ...]


@dataclass(frozen=True)
class Route(Node):
    """`route = topic`: what has this name says, in every call, how much of each active adapter a token is given."""

    name: str
