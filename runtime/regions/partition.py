"""Where a model's graphs begin, as data: which modules are regions, which are split, and why. Needs no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WHOLE = ""
"""The name of the model itself among modules."""


@dataclass(frozen=True)
class RegionRow:
    """Modules that run graphs: alike ones share every trace.

    `why` says why regions begin there. `variants` is how many graphs one trace of them becomes, since adapters inside
    of them differ; `traces` how many traces there are so far, one for each kind of call. Modules of equal `kind` in two
    rows share their traces too: they begin there for different reasons.
    """

    modules: tuple[str, ...]
    kind: str
    why: str
    variants: int = 1
    traces: int = 0


@dataclass(frozen=True)
class SplitRow:
    """Modules that run their own Python, with regions inside of them, and why.

    `called` tells that a call found it out, and for such calls; otherwise it is seen in the tree, and for all.
    `owned` tells that their own weights are adapted, which are computed for their Python in every such call; `refused`
    that adapters of theirs are no weights, or on weights that are stored packed, so that such a call is an error.
    """

    modules: tuple[str, ...]
    why: str
    called: bool = False
    refused: bool = False
    owned: bool = False


@dataclass(frozen=True)
class Partition:
    """Which modules of a model run graphs. Everything around them runs the model's own Python.

    `asked` is where regions were to begin; `whole` says why the model is one graph instead, and is empty where it is
    not: then the model itself, under the name `WHOLE`, is the only region.
    """

    asked: str
    whole: str = ""
    regions: tuple[RegionRow, ...] = ()
    splits: tuple[SplitRow, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for each in self.regions:
            more = f", {each.variants} variants" if each.variants > 1 else ""
            more += f", traced {each.traces} times" if each.traces > 1 else ", traced once" if each.traces else ""
            yield f"{_named(each.modules)}: {each.kind}, {each.why}{more}"
        for split in self.splits:
            how = "refused" if split.refused else "split for some calls" if split.called else "split"
            on = ", with its adapted weights computed for it" if split.owned and not split.refused else ""
            yield f"{_named(split.modules)}: {how}, {split.why}{on}"
        if not self.regions and not self.splits:
            yield "no module runs a graph"


def _named(modules: Sequence[str]) -> str:
    first = modules[0] or "the model"
    return first if len(modules) == 1 else f"{first} to {modules[-1]} ({len(modules)})"
