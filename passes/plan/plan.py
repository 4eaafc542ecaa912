"""A plan: which adapter puts which parameters where. Data, made before any graph is touched."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from peftc.grammar.algebra.measure import sizes_of
from peftc.grammar.method.rule import BoundParam, BoundRule
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.syntax import tree
from peftc.passes.plan.site import Site


class ParamKey(NamedTuple):
    """The identity of one adapter parameter. A tuple is hashed fast, and loading an adapter looks each up often."""

    adapter: str  # "support"
    site: str  # Site.name, or the module of a trained copy; empty for what an adapter's sites share
    role: str  # "A", with a number where groups of sites share it, or the parameter's own name in a trained copy


@dataclass(frozen=True)
class PlannedSite:
    """A rule with its values, at a site."""

    site: Site
    bound: BoundRule

    def saved_shape(self, param: BoundParam) -> tuple[int, ...]:
        """A parameter's shape in a checkpoint: at a convolution, PEFT gives most the axes of its kernel too.

        A last size of `kernel` becomes them, at least two; one of `n * kernel`, as is `in`, becomes n and them.
        """
        if not self.site.kernel:
            return param.shape
        rule = next(each for each in self.bound.rule.params if each.role == param.role)
        if not rule.kernel:
            return param.shape
        kernel, before = self.site.kernel, param.shape[:-1]
        ones = (1,) * len(kernel)
        match rule.shape[-1]:
            case tree.Name("kernel"):
                return (*before, *kernel, *(1,) * (2 - len(kernel)))
            case tree.Name("in") | tree.Binary("*", _, tree.Name("kernel")):
                return (*before, param.shape[-1] // math.prod(kernel), *kernel)
        return (1, *param.shape, *ones) if len(param.shape) == 1 else (*param.shape, *ones)

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained here alone."""
        return sum(math.prod(each.shape) for each in self.own if each.trained)

    @property
    def front(self) -> tuple[int, ...]:
        """The sizes of the `prompt'` of a place that is no weight; empty elsewhere."""
        if self.bound.prompt is None:
            return ()
        shapes = {each.role: each.shape for each in self.bound.starts}
        return sizes_of(self.bound.prompt, shapes, (self.site.out_features, self.site.in_features))

    @property
    def own(self) -> tuple[BoundParam, ...]:
        """The tensors of this site, without what the adapter's sites share."""
        return tuple(each for each in self.bound.params if not each.shared)

    def key(self, adapter: str, param: BoundParam) -> "ParamKey":
        """Which tensor a parameter of this site is."""
        role = param.role if param.group is None else f"{param.role}.{param.group}"
        return ParamKey(adapter, "" if param.shared else self.site.name, role)


@dataclass(frozen=True)
class PlannedCopy:
    """An adapter's own copy of some of a module's tensors: trained (`train`, modules_to_save, `bias`), or as read.

    `tensors` are (name within the module, shape, whether it is a parameter); buffers are copied and saved, not trained.
    `saved` is what a method that trains copies has between the module's name and the tensor's in a file. `tied` are
    tensors, by name within the module, and the full names of others that the copy takes the place of too; a copy that
    is `parted` takes the place of a tensor in one of its uses only. `read` is of a copy that nothing trains: the names
    of the base's tensors that a file holds others of. What else adapts or trains these, does so with them.
    """

    module: str
    tensors: tuple[tuple[str, tuple[int, ...], bool], ...]
    is_bias: bool = False
    saved: str = ""
    tied: tuple[tuple[str, str], ...] = ()
    parted: bool = False
    read: tuple[str, ...] = ()

    def names(self, tensor: str) -> tuple[str, ...]:
        """The full names of the base's tensors that the copy of one takes the place of."""
        return (f"{self.module}.{tensor}".lstrip("."), *(full for own, full in self.tied if own == tensor))

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        total = 0
        for _, shape, trained in self.tensors:
            size = int(trained)
            for each in shape:
                size *= each
            total += size
        return total


ROWS, IDS, ORDER = "@rows", "@ids", "@order"
"""The roles of trained rows: the rows as the spec orders them, their ids in ascending order, and each one's row."""


@dataclass(frozen=True)
class PlannedRows:
    """Trained rows of a module's weight, `[tokens, width]`: values that take the place of the weight's own.

    `tied` are the other modules that read the same weight and the same rows. `saved` is what a file has between the
    module's name and the end of the key, `ids` are in the order of the file's rows.
    """

    module: str
    ids: tuple[int, ...]
    width: int
    tied: tuple[str, ...] = ()
    saved: str = ""

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return len(self.ids) * self.width

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that reads the rows."""
        return (self.module, *self.tied)

    @property
    def order(self) -> tuple[int, ...]:
        """The rows by ascending id."""
        return tuple(sorted(range(len(self.ids)), key=self.ids.__getitem__))


@dataclass(frozen=True)
class AdapterPlan:
    """Everything one adapter needs on one model."""

    spec: AdapterSpec
    sites: tuple[PlannedSite, ...]
    copies: tuple[PlannedCopy, ...] = ()
    rows: tuple[PlannedRows, ...] = ()

    @property
    def trained(self) -> tuple[PlannedCopy, ...]:
        """The copies that are trained."""
        return tuple(each for each in self.copies if not each.read)

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.spec.name

    @property
    def shared(self) -> tuple[BoundParam, ...]:
        """The tensors that the sites share, each once."""
        found: dict[tuple[str, int | str | None], BoundParam] = {}
        for at in self.sites:
            for each in at.bound.params:
                if each.shared:
                    found.setdefault((each.role, each.group), each)
        return tuple(found.values())

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        shared = sum(math.prod(each.shape) for each in self.shared if each.trained)
        parts: list[PlannedSite | PlannedCopy | PlannedRows] = [*self.sites, *self.copies, *self.rows]
        return shared + sum(each.parameter_count for each in parts)
