"""The syntax tree of `.adapter` files: frozen, compared without spans, so that parse(format(tree)) == tree."""

from dataclasses import dataclass, field
from typing import Literal

from peftc.grammar.syntax.activation import Activate, ActivateTerm, Route
from peftc.grammar.syntax.syntax import (
    AllSelector,
    Argument,
    Binary,
    Call,
    Conditional,
    Expr,
    Flag,
    Index,
    Name,
    Node,
    Null,
    Number,
    PathSelector,
    PatternSelector,
    Segment,
    Selector,
    Sequence,
    Text,
    Transpose,
    Unary,
)

__all__ = [
    "Activate",
    "ActivateTerm",
    "Adapter",
    "AllSelector",
    "AllocateItem",
    "Argument",
    "Base",
    "BaseEntry",
    "BiasClause",
    "Binary",
    "Call",
    "Clause",
    "Combined",
    "Conditional",
    "ConstItem",
    "CopiesItem",
    "DefaultAsItem",
    "DefaultItem",
    "Expr",
    "File",
    "Flag",
    "Hyperparameter",
    "Index",
    "KindsItem",
    "LetItem",
    "Method",
    "MethodItem",
    "Name",
    "Node",
    "Null",
    "Number",
    "OnClause",
    "ParamItem",
    "PathSelector",
    "PatternSelector",
    "PeftField",
    "PeftItem",
    "PrimeItem",
    "RefineClause",
    "RequireItem",
    "Route",
    "RowsItem",
    "Segment",
    "Selector",
    "Sequence",
    "SkipClause",
    "Statement",
    "Text",
    "TokensClause",
    "TrainClause",
    "Transpose",
    "Unary",
    "UnreadItem",
    "Use",
    "Variant",
]

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
    """`train lm_head`: fully trained copies of modules, saved with the adapter; `tied`: of what is tied to them too."""

    selectors: tuple[Selector, ...]
    tied: bool = False


@dataclass(frozen=True)
class BiasClause(Node):
    """`bias all` trains every bias of the base, `bias adapter` those of adapted modules."""

    mode: Literal["none", "all", "adapter"]


@dataclass(frozen=True)
class TokensClause(Node):
    """`tokens ["<tool>", 17]`: trainable rows of the embedding, or of modules it names, by token or id."""

    tokens: tuple[Text | Number, ...]
    modules: tuple[Selector, ...] = ()


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
class Combined(Node):
    """`adapter NAME = combine(a, b, weights = [0.7, 0.3])`: an adapter made of others. The names are as labels are."""

    name: str
    adapters: tuple[Name, ...]
    options: tuple[Argument, ...] = ()


# --- methods ---


@dataclass(frozen=True)
class Hyperparameter(Node):
    """`rank: int = 8`. `type` is int, float, bool, text or ints, a list of int; `choices` limits a text."""

    name: str
    type: Literal["int", "float", "bool", "text", "ints"]
    default: Expr
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class KindsItem(Node):
    """`on linear, conv1d`: the kinds of site the method fits."""

    kinds: tuple[str, ...]


@dataclass(frozen=True)
class DefaultItem(Node):
    """`default q_proj, v_proj for llama, mistral`: the targets when a spec says none, by config.model_type.

    `with` may give these targets values of their own.
    """

    targets: tuple[str, ...]
    architectures: tuple[str, ...]
    overrides: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class DefaultAsItem(Node):
    """`default as lora`: the default targets of another method."""

    method: str


@dataclass(frozen=True)
class Variant(Node):
    """`on embedding = zeros saved "lora_embedding_A"`: another initialiser and key for one kind of site."""

    kind: str
    init: Expr
    saved: str


@dataclass(frozen=True)
class ParamItem(Node):
    """`param A[rank, in] = kaiming_uniform(a = sqrt(5)) saved "lora_A.weight" with kernel`.

    It exists at the sites where `condition` holds. With a `group`, what is shared is one for each number it comes to.
    """

    name: str
    shape: tuple[Expr, ...]
    init: Expr
    saved: str
    variants: tuple[Variant, ...] = ()
    kernel: bool = field(default=False, kw_only=True)
    shared: bool = field(default=False, kw_only=True)
    group: Expr | None = field(default=None, kw_only=True)
    condition: Expr | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class ConstItem(Node):
    """`const A[rank, in] = normal(std = 1) seeded seed`: a tensor that is not trained.

    It is `saved` (`saved_when` a condition holds), or made again from a seed, or, with neither, recomputed. One that
    is there `once` is not made again: others start from it.
    """

    name: str
    shape: tuple[Expr, ...]
    init: Expr
    saved: str | None = None
    saved_when: Expr | None = None
    seed: Expr | None = None
    once: bool = field(default=False, kw_only=True)
    shared: bool = field(default=False, kw_only=True)
    group: Expr | None = field(default=None, kw_only=True)
    condition: Expr | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class RequireItem(Node):
    """`require in % block == 0`: what a site must be for the method to fit it."""

    test: Expr


@dataclass(frozen=True)
class LetItem(Node):
    """`let s = alpha / rank`. A tensor that is computed may be `saved` as the value it has, for a prompt'."""

    name: str
    value: Expr
    saved: str = ""


@dataclass(frozen=True)
class PrimeItem(Node):
    """`W' = ...`: the adapted weight; `b' = ...`: the adapted bias; `prompt' = ...`: what is put in front.

    `gate' = ...` multiplies the attention to it, `labels' = ...` are the ids that a loss expects of it.
    """

    target: Literal["W", "b", "prompt", "gate", "labels"]
    value: Expr


@dataclass(frozen=True)
class CopiesItem(Node):
    """`copies saved "norms"`: the method trains copies of whole modules, saved under this key."""

    saved: str


@dataclass(frozen=True)
class RowsItem(Node):
    """`rows saved "delta"`: the method trains rows of embeddings, those of `tokens`, saved under this key."""

    saved: str


@dataclass(frozen=True)
class UnreadItem(Node):
    """`unread "A.zeros"`: keys that a PEFT file may have at a site and that change nothing."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class AllocateItem(Node):
    """`allocate E with A, B { target = kept, steps = steps }`: entries of a vector that training keeps or drops.

    Each entry has a part in every partner: those along the axis that counts the entries.
    """

    vector: str
    partners: tuple[str, ...]
    settings: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class PeftField(Node):
    """`r = rank by rank_pattern`: a field of adapter_config.json, what gives it, and the field of its exceptions."""

    name: str
    value: Expr
    pattern: str = ""


@dataclass(frozen=True)
class PeftItem(Node):
    """`peft LORA { r = rank, ... }`."""

    type: str
    fields: tuple[PeftField, ...]


MethodItem = (
    KindsItem
    | DefaultItem
    | DefaultAsItem
    | ParamItem
    | ConstItem
    | LetItem
    | RequireItem
    | PrimeItem
    | CopiesItem
    | RowsItem
    | UnreadItem
    | AllocateItem
    | PeftItem
)


@dataclass(frozen=True)
class Method(Node):
    """`method NAME(hyperparameters) { items }`, with its leading comment as documentation."""

    name: str
    hyperparameters: tuple[Hyperparameter, ...]
    items: tuple[MethodItem, ...]
    doc: str = ""


Statement = Use | Base | Adapter | Combined | Activate | Route | Method


@dataclass(frozen=True)
class File(Node):
    """A whole `.adapter` file."""

    statements: tuple[Statement, ...]
