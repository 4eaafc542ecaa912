"""The partition of an adapted model as it stands: read off the regions that it has and what their calls left."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from peftc.grammar.spec.spec import Regions
from peftc.passes.plan.plain import plain_class
from peftc.passes.plan.structure import Structure
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.kinds import fingerprint, split_by
from peftc.runtime.regions.owned import owned_tensors
from peftc.runtime.regions.partition import WHOLE, Partition, RegionRow, SplitRow
from peftc.runtime.regions.places import why_whole
from peftc.runtime.regions.within import Part, is_within

ASKED = 'asked for by regions = "model"'
SPLIT = "the module around it is split"
MOVED = "it was moved here, with the adapters that it had"


def partition_of(host: Host, structure: Structure, regions: Regions) -> Partition:
    """Where graphs begin while adapters of this structure are active. Traces nothing.

    What is attached to modules is seen as it is now; what calls found out is told of modules as they are now.
    """
    model = host.engine.model
    whole = ASKED if regions == "model" else why_whole(structure)
    if whole:
        row = RegionRow((WHOLE,), type(model).__name__, whole, traces=host.engine.trace_count)
        return Partition(regions, whole, (row,))
    if not host.is_settled:
        host.renew()
    modules = dict(model.named_modules(remove_duplicate=False))
    found = _Outline(host, structure, modules)
    found.visit([path for path in modules if path in host.regions])
    return Partition(regions, "", tuple(found.regions()), tuple(found.splits()))


@dataclass
class _Outline:
    host: Host
    structure: Structure
    modules: dict[str, nn.Module]
    _kinds: dict[Hashable, str] = field(default_factory=dict)
    _begun: dict[tuple[Hashable, str], list[tuple[str, Structure]]] = field(default_factory=dict)
    _split: dict[tuple[str, bool, bool, bool], list[str]] = field(default_factory=dict)

    def visit(self, paths: Sequence[str]) -> None:
        """Take down the outermost of these that have adapters inside, and those within them where they are split.

        A module comes before what is within it.
        """
        met: set[str] = set()
        for path in paths:
            if met.isdisjoint(_around(path)) and (part := self.host.part(self.structure, path)) is not None:
                met.add(path)
                if self._is_split(path, part):
                    self.visit([each for each in paths if each != path and is_within(each, path)])

    def _is_split(self, path: str, part: Part) -> bool:
        region = self.host.regions[path]
        if self.modules[path] is not region.module:
            self._split.setdefault((MOVED, False, False, False), []).append(path)
            return False
        kind, always = fingerprint(region.module), split_by(region.module, "")
        sometimes = () if always else (*self.host.traces.failures(kind), *region.opaque)
        if not always and (self.host.traces.count(kind) or not sometimes):
            self._name(kind, region.module)
            self._begun.setdefault((kind, region.why or SPLIT), []).append((path, part.structure))
        refused, owned = self.host.is_refused(region, part), bool(owned_tensors(region.module, part.structure))
        for reason in (always,) if always else sometimes:
            self._split.setdefault((reason, not always, refused, owned), []).append(path)
        return bool(always or sometimes)

    def regions(self) -> Iterator[RegionRow]:
        """The rows of regions, in the order in which modules were first taken down."""
        for (kind, why), begun in self._begun.items():
            paths = tuple(path for path, _ in begun)
            variants = len({structure for _, structure in begun})
            yield RegionRow(paths, self._kinds[kind], why, variants, self.host.traces.count(kind))

    def splits(self) -> Iterator[SplitRow]:
        """The rows of what is split."""
        for (why, called, refused, owned), paths in self._split.items():
            yield SplitRow(tuple(paths), why, called, refused, owned)

    def _name(self, kind: Hashable, module: nn.Module) -> None:
        """Kinds are called by their class, and from the second on of one class by a number too."""
        if kind not in self._kinds:
            name = plain_class(module).__name__
            number = sum(each.split(" ")[0] == name for each in self._kinds.values())
            self._kinds[kind] = f"{name} {number + 1}" if number else name


def _around(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path
