"""The part of the active adapters that decides what the graph looks like.

Adapters of equal structure differ only in tensors and scalar values, which live in slots: one graph serves them all.
"""

import keyword
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from peftc.grammar.algebra import algebra
from peftc.grammar.method.rule import COMPATIBLE, BoundRule
from peftc.passes.plan.plan import ROWS, AdapterPlan, PlannedSite
from peftc.passes.plan.site import Site

FLOAT = "float__"  # in front of a scalar's name: the same value as a plain number
LOG_WEIGHT = "log__weight"  # the scalar that weighs attention to what stands in front of the cache
STORED = "packed"  # where graphs read what modules store packed
MEMBER = "member"  # the scalar that says whether a row has a lane
GATE = "by_input"  # how much of an adapter each token is given
TASK = "asked__task"  # the whole number `[1]` that a call says for a row; no role, nor scalar, has such a name
WEIGHT = "weight"  # the scalar that carries an adapter's activation weight, where no other can


@dataclass(frozen=True)
class Role:
    """A tensor a term reads: its name, its type, which axis holds the experts (at a stack), whether it is shared.

    `sizes` are its own sizes where the graph depends on them, else empty: then one graph fits every rank.
    """

    name: str
    dtype: torch.dtype
    stacked_axis: int | None
    shared: bool = False
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Term:
    """One adapter's part at a site: `W'` and `b'` over the previous `W` and `b`, in the adapter's own roles."""

    position: int
    weight: algebra.Matrix
    roles: tuple[Role, ...]
    scalars: tuple[str, ...]
    bias: algebra.Matrix | None = None

    @property
    def tasks(self) -> int:
        """How many tasks it has something for, of which a call says one for each row; 0 where it asks for none."""
        return algebra.task_count(self.weight, self.bias)


@dataclass(frozen=True)
class AdaptedSite:
    """A site and the terms of the active adapters there, in order of activation.

    Where rows of a call have adapters of their own, `lanes` says how many of the terms, in order, are a row's at once:
    a row has those of one lane, or none.
    """

    site: Site
    terms: tuple[Term, ...]
    lanes: tuple[int, ...] = ()

    def by_lane(self) -> Iterator[tuple[Term, ...]]:
        """The terms of each lane."""
        start = 0
        for count in self.lanes:
            yield self.terms[start : start + count]
            start += count


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor of a module that an active adapter replaces by its own copy."""

    position: int
    module: str
    tensor: str
    dtype: torch.dtype
    trained: bool
    alias: str = ""  # the name of a tensor that is tied to it

    @property
    def target(self) -> str:
        """The full name of the tensor replaced."""
        return self.alias or f"{self.module}.{self.tensor}".lstrip(".")


@dataclass(frozen=True)
class VirtualTokens:
    """What an adapter puts in front at a place that is no weight: `term.weight` is its `prompt'`, `.bias` its `gate'`.

    `labels` are the ids that a loss expects of it, over the term's tensors. `length` is how many virtual tokens; with
    `tasks` there are so many sets of them, and the call says which by row.
    `compatible` asks for PEFT's positions and lengths. With `weighted` the attention to them is multiplied by a weight.
    """

    site: Site
    term: Term
    length: int
    tasks: int = 0
    compatible: bool = False
    labels: algebra.Matrix | None = None
    weighted: bool = False


@dataclass(frozen=True)
class ReplacedRows:
    """Rows of a module's weight that an active adapter replaces; it holds them under the name of `source`."""

    position: int
    module: str
    source: str
    dtype: torch.dtype

    @property
    def target(self) -> str:
        """The full name of the weight."""
        return f"{self.module}.weight".lstrip(".")


@dataclass(frozen=True)
class Structure:
    """Everything about the active adapters that a graph depends on; `by_row` where each row of a call has its own.

    Of the adapters at the positions `gated` each token of a call is given as much as the call says.
    """

    sites: tuple[AdaptedSite, ...] = ()
    copies: tuple[CopiedTensor, ...] = ()
    rows: tuple[ReplacedRows, ...] = ()
    fronts: tuple[VirtualTokens, ...] = ()
    by_row: bool = False
    gated: frozenset[int] = frozenset()

    @cached_property
    def tasks(self) -> int:
        """How many tasks weights are for, the fewest of any; 0 where no weight depends on the task of a row."""
        return min((term.tasks for at in self.sites for term in at.terms if term.tasks), default=0)

    def at(self, kind: str) -> tuple[VirtualTokens, ...]:
        """What is put in front at the places of a kind, in order of activation."""
        return tuple(each for each in self.fronts if each.site.kind == kind)


Dtypes = Mapping[tuple[str, str], torch.dtype]  # (site name, role) -> dtype


def structure_of(active: Sequence[tuple[AdapterPlan, Dtypes]], weights: Sequence[float] = ()) -> Structure:
    """The structure of adapters activated in this order, with these weights or else none.

    Of a weight the structure has only whether it is one; what stands in front of the cache with a weight of zero is
    left out, so that the text begins where it would.
    """
    terms: dict[str, list[Term]] = {}
    sites: dict[str, Site] = {}
    copies: list[CopiedTensor] = []
    read: list[CopiedTensor] = []  # which trained ones go before
    rows: list[ReplacedRows] = []
    fronts: list[VirtualTokens] = []
    for position, (plan, dtypes) in enumerate(active):
        for planned in plan.sites:
            if planned.bound.prompt is not None:
                weight = weights[position] if weights and planned.site.kind == "cache" else 1.0
                if weight:
                    fronts.append(replace(_front(position, plan, planned, dtypes), weighted=weight != 1.0))
                continue
            sites[planned.site.name] = planned.site
            terms.setdefault(planned.site.name, []).append(_term(position, plan, planned, dtypes))
        for copy in plan.copies:
            for tensor, _, trained in copy.tensors:
                dtype = dtypes[copy.module, tensor]
                for alias in ("", *copy.names(tensor)[1:]):
                    one = CopiedTensor(position, copy.module, tensor, dtype, trained, alias)
                    (read if copy.read else copies).append(one)
        for own in plan.rows:
            kind = dtypes[own.module, ROWS]
            rows += [ReplacedRows(position, module, own.module, kind) for module in own.modules]
    adapted = tuple(AdaptedSite(site, tuple(terms[name])) for name, site in sites.items())
    return Structure(adapted, _last_of_each(read, copies), tuple(rows), tuple(fronts))


def _last_of_each(*copies: Sequence[CopiedTensor]) -> tuple[CopiedTensor, ...]:
    """Of several copies of a tensor the last."""
    return tuple({each.target: each for group in copies for each in group}.values())


@lru_cache(maxsize=256)
def weighted(matrix: algebra.Matrix, bias: algebra.Matrix | None = None) -> tuple[algebra.Matrix, str | None]:
    """`W + D` in a form with a scalar that scales `D`, and that scalar's name.

    `W + s * D` has one already; `W + D` becomes `W + weight * D`. The name is None when the expression is not `W` plus
    something, or the bias changes too, and then only an activation weight of one is possible.
    """
    match matrix:
        case _ if bias is not None:
            return matrix, None
        case algebra.Sum(algebra.Weight(), algebra.Scaled(scalar, _)) if _uses(matrix, scalar) == 1:
            return matrix, scalar
        case algebra.Sum(algebra.Weight(), delta):
            return algebra.Sum(algebra.Weight(), algebra.Scaled(WEIGHT, delta)), WEIGHT
        case _:
            return matrix, None


def _front(position: int, plan: AdapterPlan, planned: PlannedSite, dtypes: Dtypes) -> VirtualTokens:
    bound = planned.bound
    assert bound.prompt is not None
    used, scalars, _ = _names(bound.prompt, bound.gate, bound.labels)
    params = [each for each in bound.params if each.role in used]
    keys = [planned.key(plan.name, each) for each in params]
    roles = tuple(
        Role(each.role, dtypes[key.site, key.role], None, each.shared, each.shape)
        for each, key in zip(params, keys, strict=True)
    )
    *tasks, length = planned.front[:-1]
    term = Term(position, bound.prompt, roles, scalars, bound.gate)
    compatible = bool(dict(bound.values).get(COMPATIBLE, False))
    return VirtualTokens(planned.site, term, length, tasks[0] if tasks else 0, compatible, bound.labels)


def _term(position: int, plan: AdapterPlan, planned: PlannedSite, dtypes: Dtypes) -> Term:
    bound = planned.bound
    matrix, _ = weighted(bound.weight, bound.bias)
    used, scalars, is_free = _names(matrix, bound.bias)
    roles = tuple(
        Role(
            param.role,
            dtypes[(key := planned.key(plan.name, param)).site, key.role],
            param.stacked_axis,
            param.shared,
            () if is_free else param.shape,
        )
        for param in bound.params
        if param.role in used
    )
    return Term(position, matrix, roles, scalars, bound.bias)


def fits_every_rank(bound: BoundRule) -> bool:
    """Whether a graph of the rule's weight and bias fits whatever rank its parameters have."""
    return bound.prompt is None and _names(weighted(bound.weight, bound.bias)[0], bound.bias)[2]


@lru_cache(maxsize=256)
def _names(matrix: algebra.Matrix, *more: algebra.Matrix | None) -> tuple[frozenset[str], tuple[str, ...], bool]:
    """The roles the expressions read, their scalars in order, and whether a graph of them fits every rank."""
    nodes = [node for each in (matrix, *more) if each is not None for node in algebra.walk(each)]
    scalars = dict.fromkeys(each.scalar for each in nodes if isinstance(each, algebra.Scaled))
    roles = frozenset(each.role for each in nodes if isinstance(each, algebra.Param))
    return roles, tuple(scalars), not any(isinstance(each, algebra.Function) for each in nodes)


def _uses(matrix: algebra.Matrix, scalar: str) -> int:
    return sum(isinstance(each, algebra.Scaled) and each.scalar == scalar for each in algebra.walk(matrix))


def site_slot(position: int, site: str) -> str:
    """The attribute path of an adapter's slot for a site; dots of the site's name would read as attributes."""
    return f"slots.p{position}__{flat(site)}"


def copy_slot(position: int, module: str) -> str:
    """The attribute path of an adapter's slot for the trained copy of a module."""
    return f"copies.p{position}__{flat(module)}"


def rows_slot(position: int, module: str) -> str:
    """The attribute path of an adapter's slot for trained rows of a module."""
    return f"copies.r{position}__{flat(module)}"


def slot_role(role: str) -> str:
    """The name of a role, or of a copied tensor, within its slot, and in the adapter that has it.

    Graphs become Python code, in which some words are taken.
    """
    name = flat(role.removeprefix("@"))
    return f"{name}__" if keyword.iskeyword(name) else name


def storage_slot(module: str) -> str:
    """The attribute path of what a module stores packed."""
    return f"{STORED}.{flat(module)}"


def float_of(slot_scalar: str) -> str:
    """The attribute path of a scalar's slot as a plain number, for operators that take one."""
    owner, _, name = slot_scalar.rpartition(".")
    return f"{owner}.{FLOAT}{name}"


def flat(name: str) -> str:
    """A dotted name as one attribute's."""
    flat = name.replace(".", "__")
    # `a.b` and `a__b` would be one slot: a name whose own underscores can be taken for a dot says which it is.
    ambiguous = any(each in name for each in ("__", "_.", "._"))
    return f"{flat}__{zlib.crc32(name.encode()):08x}" if ambiguous else flat
