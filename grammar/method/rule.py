"""A method, checked: what the compiler needs to know about an adapter, as data."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from peftc.grammar.algebra import algebra
from peftc.grammar.source import Span
from peftc.grammar.syntax import tree

Value = int | float | bool | str | tuple[int, ...] | None

Values = tuple[tuple[str, Value], ...]

KINDS = (
    "linear",
    "conv1d",  # transformers' Conv1D, a linear that stores its weight transposed
    "embedding",
    "convolution1d",
    "conv2d",
    "conv3d",
    "multihead_attention",
    "parameter",
)

# Places in a model that are no weight, each with what a method for it defines: `prompt'`, in front of what is there.
#   prompt: the embedded tokens; in = the vocabulary's size, out = an embedding's, W = the embeddings, transposed
#   cache: the keys and values of all layers; in = one layer's keys of a token, out = all keys and values of a token
#   attention: what the heads of one attention module attend to; in = out = the hidden size
PLACES = ("attention", "cache", "prompt")

# The hyperparameter of a method for `prompt` that asks for PEFT's positions and lengths.
COMPATIBLE = "peft_compatible"

# The hyperparameter of a method that trains rows, and its value where these start as noise and not as the base's own.
ROWS_START = ("init", "random")

# The hyperparameter of a method for `attention` that says how many modules, the last ones, it is for.
LAST = "layers"


@dataclass(frozen=True)
class Init:
    """How a tensor starts: a known initialiser and its evaluated numeric arguments.

    Known: zeros, ones, constant(value), normal(mean, std), uniform(low, high, digits), kaiming_uniform(a),
    xavier_uniform(), randperm(limit), balanced(limit): whole numbers below it, each as often as any other,
    in random order, randint(limit): any whole numbers below it, distinct(limit): none twice along the last axis,
    listed(values): those of a list, encoded(text, tokenizer): the ids of its tokens, again and again until it is full,
    places(rows, columns): distinct places of a matrix, in order, row above column,
    off_diagonal(size): distinct places beside the diagonal of a square matrix,
    covariance(), second_moment(): of the inputs that a site sees while the adapter is calibrated,
    quantization_error(): of the site's weight, what it was before it was quantized less what is stored of it.
    """

    function: str
    arguments: tuple[tuple[str, float | str | tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Derived:
    """A start computed once, from the base weight, constants and parameters defined before."""

    value: algebra.Matrix
    scalars: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ParamRule:
    """A parameter or constant as defined: its shape over `in`, `out` and hyperparameters, its start and its storage.

    `init` and `saved` map a site kind to its own; the kind `""` is the rule for all others. A tensor without a key is
    not saved: it is made again from `seed`, or recomputed. One that is `shared` belongs to the adapter, not to a site;
    with a `group` there is one for each number or text that comes to at the sites.
    """

    role: str
    shape: tuple[tree.Expr, ...]
    init: tuple[tuple[str, tree.Expr], ...]
    saved: tuple[tuple[str, str], ...] = ()
    trained: bool = True
    shared: bool = False
    condition: tree.Expr | None = None
    saved_when: tree.Expr | None = None
    seed: tree.Expr | None = None
    group: tree.Expr | None = None
    once: bool = False  # there only while others are first made
    kernel: bool = False  # at a convolution, saved with the kernel's axes

    def saved_for(self, kind: str) -> str:
        """The checkpoint key suffix at a site of this kind; empty where it is not saved."""
        keys = dict(self.saved)
        return keys.get(kind, keys.get("", ""))


@dataclass(frozen=True)
class AllocationRule:
    """Which entries of which tensors a budget is kept in, by role and axis, the vector first, and its settings."""

    axes: tuple[tuple[str, int], ...]
    settings: tuple[tuple[str, tree.Expr], ...]


@dataclass(frozen=True)
class Schedule:
    """When a budget falls and how importance is smoothed: see `runtime.allocation`. No `steps` means not said."""

    steps: int
    warmup: int = 0
    final: int = 0
    every: int = 1
    sensitivity: float = 0.85
    uncertainty: float = 0.85
    orthogonal: float = 0.0


@dataclass(frozen=True)
class Allocation:
    """An allocation at a site: roles and axes of an entry's parts, the vector's first, and its share of the budget."""

    axes: tuple[tuple[str, int], ...]
    target: int
    schedule: Schedule


DefaultTargets = tuple[tuple[str, ...], tuple[tuple[str, Value], ...]]
"""Module names, and the values that differ there."""


@dataclass(frozen=True)
class MethodRule:
    """A checked method definition; hashable, so that two files defining the same method agree.

    One with `copies` has no formula: it trains copies of modules, saved with this between module and tensor.
    One with `rows` trains rows of embeddings, the tokens of the spec, saved under this key.
    One with a `prompt` changes no weight: it is for one of PLACES.
    `unread` are keys that a file may have at a site and that change nothing.
    """

    name: str
    hyperparameters: tuple[tree.Hyperparameter, ...]
    kinds: tuple[str, ...]
    params: tuple[ParamRule, ...]
    lets: tuple[tuple[str, tree.Expr], ...]
    weight: tree.Expr | None
    bias: tree.Expr | None = None
    prompt: tree.Expr | None = None
    gate: tree.Expr | None = None  # what the attention to `prompt` is multiplied by
    labels: tree.Expr | None = None  # the ids a loss expects the model to say of `prompt`; -100: none
    settled: tuple[str, str] = ("", "")  # the `let` whose value is saved beside what it is made of, and its key
    requires: tuple[tree.Expr, ...] = ()
    order: tuple[str, ...] = ()  # of the params and lets, as defined
    defaults: tuple[tuple[str, tuple[DefaultTargets, ...]], ...] = ()  # by model_type
    peft_type: str = ""
    peft_fields: tuple[tree.PeftField, ...] = ()
    counts_sites: bool = False  # whether sites that are alike differ by their place among the others
    copies: str = ""
    rows: str = ""
    unread: tuple[str, ...] = ()
    allocation: AllocationRule | None = None
    doc: str = ""
    span: Span | None = field(default=None, compare=False, repr=False)

    def default_targets(self, model_type: str) -> tuple[DefaultTargets, ...]:
        """What is adapted when a spec names nothing; empty where the method has no default for the type."""
        return dict(self.defaults).get(model_type, ())


@dataclass(frozen=True)
class BoundParam:
    """A parameter or constant at a site: everything needed to create, find and save it.

    `stacked_axis` is where a stack of experts puts its tensors side by side; None: in front, or there is no stack.
    `saved` is the key it has in a file, if it can be in one. What is `optional` can be made again, from `seed` or the
    base, so that a file may lack it; what is not `written` is left out of ours.
    """

    role: str
    shape: tuple[int, ...]
    init: Init | Derived
    saved: str
    trained: bool = True
    shared: bool = False
    optional: bool = False
    seed: int | None = None
    written: bool = True
    stacked_axis: int | None = None
    group: int | str | None = None


@dataclass(frozen=True)
class BoundRule:
    """A method at one site with one set of values: closed form, scalars, parameters and constants.

    `bias` is None where the method leaves the bias as it is. `drafts` are needed only while others are first made: all
    tensors in the order of definition are `starts`.
    """

    rule: MethodRule
    values: tuple[tuple[str, Value], ...]
    weight: algebra.Matrix
    scalars: tuple[tuple[str, float], ...]
    params: tuple[BoundParam, ...]
    bias: algebra.Matrix | None = None
    drafts: tuple[BoundParam, ...] = ()
    allocation: Allocation | None = None
    prompt: algebra.Matrix | None = None
    gate: algebra.Matrix | None = None
    settled: tuple[algebra.Matrix, tuple[int, ...], str] | None = None  # what is saved as a value, its shape and key
    labels: algebra.Matrix | None = None

    @property
    def tasks(self) -> int:
        """For how many tasks the weight or the bias is another one; 0 where they depend on none."""
        return algebra.task_count(self.weight, self.bias)

    @property
    def starts(self) -> tuple[BoundParam, ...]:
        """Everything that is made at the start, in the order of definition."""
        made = {each.role: each for each in (*self.params, *self.drafts)}
        order = dict.fromkeys(each.role for each in self.rule.params if each.role in made)
        return tuple(made[each] for each in (*order, *(each for each in made if each not in order)))

    def sources(self, roles: Iterable[str]) -> frozenset[str]:
        """The roles of the tensors that these start from."""
        inits = {each.role: each.init for each in self.starts}
        found: set[str] = set()
        waiting = list(roles)
        while waiting:
            init = inits.get(waiting.pop())
            if isinstance(init, Derived):
                new = {each.role for each in algebra.walk(init.value) if isinstance(each, algebra.Param)} - found
                found |= new
                waiting += new
        return frozenset(found)
