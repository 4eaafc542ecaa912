"""What a spec means: the one object that text and adapter_config.json both become."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from peftc.grammar.method.rule import MethodRule, Values
from peftc.grammar.source import Source, Span
from peftc.grammar.spec.recipe import Recipe
from peftc.grammar.syntax import tree

Regions = Literal["model", "layers", "modules"]
"""Where regions begin: at the model, at repeated layers and adapted modules outside of them, or at adapted modules."""

REGIONS: tuple[Regions, ...] = get_args(Regions)
COMPUTE_TYPES = ("float32", "bfloat16", "float16")
SCHEMES = {
    "nf4": ("double_quant", "compute", "skip"),
    "fp4": ("double_quant", "compute", "skip"),
    "int8": ("threshold", "skip"),
}


@dataclass(frozen=True)
class Target:
    """Sites chosen (`on`) or tuned (`refine`), with the hyperparameters that differ there."""

    selectors: tuple[tree.Selector, ...]
    where: tree.Expr | None = None
    overrides: Values = ()
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Tokens:
    """Tokens, by text or id, whose rows are trained: of the input embedding, or of the modules named."""

    tokens: tuple[str | int, ...]
    modules: tuple[tree.Selector, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter: a method, its hyperparameters (every one has a value) and where it goes.

    An empty `on` with an empty `train` means the method's own default for the model's type. Of several `on` clauses
    that choose a site the last one's overrides win; then every matching `refine`, in order. `tied` are those of `train`
    whose copies take the place of what is tied to them, too.
    `strict` is False for adapters read from a checkpoint: there a refinement that matches nothing is PEFT's normal.
    """

    name: str
    rule: MethodRule
    values: Values
    on: tuple[Target, ...] = ()
    refine: tuple[Target, ...] = ()
    skip: tuple[Target, ...] = ()
    train: tuple[tree.Selector, ...] = ()
    tied: tuple[tree.Selector, ...] = ()
    bias: Literal["none", "all", "adapter"] = "none"
    tokens: tuple[Tokens, ...] = ()
    strict: bool = True
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Part:
    """An adapter that another is made of, and the weight it has in that."""

    adapter: str
    weight: float = 1.0
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class CombinedAdapter:
    """An adapter made of others, which are before it in the spec: of a method, or combined themselves."""

    name: str
    parts: tuple[Part, ...]
    recipe: Recipe = field(default_factory=Recipe)
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Quantize:
    """How the base's linears are to be stored, by bitsandbytes. Which options a scheme has, `SCHEMES` says.

    `double_quant` has the scales quantized too; `compute` is the type that the linears compute in, None for the model's
    own; beyond `threshold` an activation is an outlier. `skip` are modules left dense with all that is in them, by
    their names or the ends of those; None for what transformers leaves (the output head, what is to be in float32).
    """

    scheme: Literal["nf4", "fp4", "int8"]
    double_quant: bool = False
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    threshold: float = 6.0
    skip: tuple[str, ...] | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Base:
    """What a spec demands of the model, checked before anything is rewritten, and how it is to be stored and run.

    `entries` are the entries as written but for `quantize` and `regions`, e.g. ("architecture",
    Text("LlamaForCausalLM")). `regions` says which modules run graphs, None where the spec does not.
    """

    entries: tuple[tree.BaseEntry, ...] = ()
    quantize: Quantize | None = None
    regions: Regions | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RouteName:
    """What says, in every call, how much of each active adapter a token is given: who makes the model has it."""

    name: str
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Spec:
    """All adapters of a file, and which start active with what weight.

    `active` is empty when the file has no `activate` and more than one adapter; a lone adapter is active. `combined`
    are made of `adapters`, once these are made, and of those of `combined` that come before.
    """

    adapters: tuple[AdapterSpec, ...]
    active: tuple[tuple[str, float], ...] = ()
    base: Base | None = None
    source: Source | None = field(default=None, compare=False, repr=False)
    combined: tuple[CombinedAdapter, ...] = field(default=(), kw_only=True)
    route: RouteName | None = field(default=None, kw_only=True)

    @property
    def quantize(self) -> Quantize | None:
        """How the base is to be stored, if the spec says so."""
        return None if self.base is None else self.base.quantize

    @property
    def regions(self) -> Regions | None:
        """Which modules are to run graphs, if the spec says so."""
        return None if self.base is None else self.base.regions

    @property
    def names(self) -> tuple[str, ...]:
        """What the adapters are called, in the order in which a model has them."""
        return (*(each.name for each in self.adapters), *(each.name for each in self.combined))

    def adapter(self, name: str) -> AdapterSpec:
        """The adapter of that name. Raises KeyError."""
        for each in self.adapters:
            if each.name == name:
                return each
        raise KeyError(name)
