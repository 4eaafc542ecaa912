"""A method, checked: what the compiler needs to know about an adapter, as data."""

from dataclasses import dataclass, field

from peftc.grammar import algebra, tree
from peftc.grammar.source import Span

Value = int | float | bool | str | None

KINDS = ("linear", "conv1d", "embedding", "conv2d", "parameter")


@dataclass(frozen=True)
class Init:
    """How a parameter starts: a known initialiser and its evaluated numeric arguments.

    Known: zeros, ones, constant(value), normal(mean, std), uniform(low, high), kaiming_uniform(a), xavier_uniform().
    """

    function: str
    arguments: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ParamRule:
    """A parameter as defined: its shape over `in`, `out` and hyperparameters, and how it starts and is saved.

    `init` and `saved` map a site kind to its own; the kind `""` is the rule for all others.
    """

    role: str
    shape: tuple[tree.Expr, ...]
    init: tuple[tuple[str, tree.Expr], ...]
    saved: tuple[tuple[str, str], ...]

    def saved_for(self, kind: str) -> str:
        """The checkpoint key suffix at a site of this kind."""
        keys = dict(self.saved)
        return keys.get(kind, keys[""])


@dataclass(frozen=True)
class MethodRule:
    """A checked method definition; hashable, so that two files defining the same method agree."""

    name: str
    hyperparameters: tuple[tree.Hyperparameter, ...]
    kinds: tuple[str, ...]
    params: tuple[ParamRule, ...]
    lets: tuple[tuple[str, tree.Expr], ...]
    weight: tree.Expr
    defaults: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (model_type, targets)
    peft_type: str = ""
    peft_fields: tuple[tuple[str, tree.Expr], ...] = ()
    doc: str = ""
    span: Span | None = field(default=None, compare=False, repr=False)

    def default_targets(self, model_type: str) -> tuple[str, ...]:
        """The module names adapted when a spec names none; empty where the method has no default for the type."""
        return dict(self.defaults).get(model_type, ())


@dataclass(frozen=True)
class BoundParam:
    """A parameter at a site: everything needed to create, find and save it."""

    role: str
    shape: tuple[int, ...]
    init: Init
    saved: str


@dataclass(frozen=True)
class BoundRule:
    """A method at one site with one set of values: closed form, scalars and parameters."""

    rule: MethodRule
    values: tuple[tuple[str, Value], ...]
    weight: algebra.Matrix
    scalars: tuple[tuple[str, float], ...]
    params: tuple[BoundParam, ...]
