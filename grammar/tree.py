"""The syntax tree of `.adapter` files: frozen, compared without spans, so that parse(format(tree)) == tree."""

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

    operator: Literal["+", "-", "*", "/", "//", "@", "**", "==", "!=", "<", "<=", ">", ">=", "and", "or"]
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

# --- specs ---


@dataclass(frozen=True)
class OnClause(Node):
    """`on q_proj, v_proj where in_features >= 64 with rank = 4`: choose sites."""

    selectors: tuple[Selector, ...]
    where: Expr | None = None
    overrides: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class RefineClause(Node):
    """`refine layers[0] with rank = 4`: other values for sites that `on` chose."""

    selectors: tuple[Selector, ...]
    where: Expr | None = None
    overrides: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class SkipClause(Node):
    """`skip layers[0]`: never these sites (nor anything inside these modules)."""

    selectors: tuple[Selector, ...]
    where: Expr | None = None


@dataclass(frozen=True)
class TrainClause(Node):
    """`train lm_head`: fully trained copies of modules, saved with the adapter."""

    selectors: tuple[Selector, ...]


@dataclass(frozen=True)
class BiasClause(Node):
    """`bias all` trains every bias of the base, `bias adapter` those of adapted modules."""

    mode: Literal["none", "all", "adapter"]


@dataclass(frozen=True)
class TokensClause(Node):
    """`tokens ["<tool>", 17]`: trainable rows of the embedding, by token or id."""

    tokens: tuple[Text | Number, ...]


Clause = OnClause | RefineClause | SkipClause | TrainClause | BiasClause | TokensClause


@dataclass(frozen=True)
class Use(Node):
    """`use "./methods.adapter"`: bring in the methods of another file."""

    path: str


@dataclass(frozen=True)
class BaseEntry(Node):
    """`architecture = "LlamaForCausalLM"` inside `base { }`."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Base(Node):
    """`base { ... }`: what the model must be."""

    entries: tuple[BaseEntry, ...]


@dataclass(frozen=True)
class Adapter(Node):
    """`adapter NAME = method(arguments) { clauses }`."""

    name: str
    method: Call
    clauses: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class ActivateTerm(Node):
    """`0.5 * style`, one term of an `activate` sum."""

    weight: float
    adapter: str


@dataclass(frozen=True)
class Activate(Node):
    """`activate support + 0.5 * style`."""

    terms: tuple[ActivateTerm, ...]


# --- methods ---


@dataclass(frozen=True)
class Hyperparameter(Node):
    """`rank: int = 8`. `type` is int, float, bool or text; `choices` limits a text."""

    name: str
    type: Literal["int", "float", "bool", "text"]
    default: Expr
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class KindsItem(Node):
    """`on linear, conv1d`: the kinds of site the method fits."""

    kinds: tuple[str, ...]


@dataclass(frozen=True)
class DefaultItem(Node):
    """`default q_proj, v_proj for llama, mistral`: the targets when a spec says none, by config.model_type."""

    targets: tuple[str, ...]
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Variant(Node):
    """`on embedding = zeros saved "lora_embedding_A"`: another initialiser and key for one kind of site."""

    kind: str
    init: Expr
    saved: str


@dataclass(frozen=True)
class ParamItem(Node):
    """`param A[rank, in] = kaiming_uniform(a = sqrt(5)) saved "lora_A.weight"`."""

    name: str
    shape: tuple[Expr, ...]
    init: Expr
    saved: str
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class LetItem(Node):
    """`let s = alpha / rank`."""

    name: str
    value: Expr


@dataclass(frozen=True)
class PrimeItem(Node):
    """`W' = ...`: the adapted weight."""

    target: Literal["W"]
    value: Expr


@dataclass(frozen=True)
class PeftField(Node):
    """`r = rank`: a field of adapter_config.json and the hyperparameter that gives it."""

    name: str
    value: Expr


@dataclass(frozen=True)
class PeftItem(Node):
    """`peft LORA { r = rank, ... }`."""

    type: str
    fields: tuple[PeftField, ...]


MethodItem = KindsItem | DefaultItem | ParamItem | LetItem | PrimeItem | PeftItem


@dataclass(frozen=True)
class Method(Node):
    """`method NAME(hyperparameters) { items }`, with its leading comment as documentation."""

    name: str
    hyperparameters: tuple[Hyperparameter, ...]
    items: tuple[MethodItem, ...]
    doc: str = ""


Statement = Use | Base | Adapter | Activate | Method


@dataclass(frozen=True)
class File(Node):
    """A whole `.adapter` file."""

    statements: tuple[Statement, ...]
