"""A plan: which adapter puts which parameters where. Data, made before any graph is touched."""

from dataclasses import dataclass

from peftc.grammar.rule import BoundRule
from peftc.grammar.spec import AdapterSpec
from peftc.passes.site import Site


@dataclass(frozen=True)
class ParamKey:
    """The identity of one adapter parameter."""

    adapter: str  # "support"
    site: str  # Site.name, or the module of a trained copy
    role: str  # "A", or the parameter's own name in a trained copy


@dataclass(frozen=True)
class PlannedSite:
    """A rule with its values, at a site."""

    site: Site
    bound: BoundRule

    @property
    def parameter_count(self) -> int:
        """How many numbers the adapter adds here."""
        total = 0
        for param in self.bound.params:
            size = 1
            for each in param.shape:
                size *= each
            total += size
        return total


@dataclass(frozen=True)
class PlannedCopy:
    """A trained copy of some of a module's own tensors (`train`, modules_to_save, `bias`).

    `tensors` are (name within the module, shape, whether it is a parameter); buffers are copied and saved, not trained.
    """

    module: str
    tensors: tuple[tuple[str, tuple[int, ...], bool], ...]
    is_bias: bool = False

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


@dataclass(frozen=True)
class AdapterPlan:
    """Everything one adapter needs on one model."""

    spec: AdapterSpec
    sites: tuple[PlannedSite, ...]
    copies: tuple[PlannedCopy, ...] = ()

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.spec.name

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return sum(each.parameter_count for each in self.sites) + sum(each.parameter_count for each in self.copies)
