"""What commands report, as plain data: `report` makes tables of it, `--json` prints it. Needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from peftc.grammar.diagnostics import Diagnostic
from peftc.runtime.merge.drift import OutputDrift
from peftc.runtime.regions.partition import Partition

Values = Mapping[str, int | float | bool | str | tuple[int, ...] | None]


@dataclass(frozen=True)
class RuleFacts:
    """One clause of an adapter and what it reaches.

    `sites` are in model order, `values` all hyperparameters there, `brief` the ones worth showing.
    """

    rule: str
    sites: tuple[str, ...]
    values: Values
    brief: str
    parameters: int


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter on a model. `weight` is its activation weight, None while it is not active; `bytes` on disk."""

    name: str
    method: str
    rules: tuple[RuleFacts, ...]
    parameters: int
    bytes: int
    weight: float | None = None


@dataclass(frozen=True)
class ModelFacts:
    """The model a spec was compiled onto; `origin` is weights, hub, random, factory or object."""

    name: str
    architecture: str
    origin: str
    seed: int | None
    parameters: int


@dataclass(frozen=True)
class BuildFacts:
    """What `peftc compile` did. `share` is the adapters' part of all parameters."""

    model: ModelFacts
    adapters: tuple[AdapterFacts, ...]
    parameters: int
    share: float
    bytes: int
    output: str | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class ModuleFacts:
    """Adapted modules of a checkpoint that are alike, in the file's order."""

    modules: tuple[str, ...]
    values: Values
    tensors: tuple[str, ...]
    dtypes: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class CheckpointFacts:
    """What is in a PEFT checkpoint. `manifest` is the peftc manifest beside it, if there is one."""

    directory: str
    peft_type: str
    method: str | None
    values: Values
    brief: str
    base: str | None
    revision: str | None
    task_type: str | None
    modules: tuple[ModuleFacts, ...]
    parameters: int
    bytes: int
    manifest: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    problems: tuple[Diagnostic, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; `problems` are left to the caller."""
        return {name: value for name, value in asdict(self).items() if name != "problems"}


@dataclass(frozen=True)
class CostFacts:
    """What a call of a site costs: floating-point operations, bytes read and written, operators, estimated seconds."""

    flops: int
    bytes: int
    calls: int
    seconds: float


@dataclass(frozen=True)
class CallFacts:
    """A call with so many tokens: the lowering it gets, and the cost of every one it could."""

    tokens: int
    lowering: str
    costs: Mapping[str, CostFacts]


@dataclass(frozen=True)
class TermFacts:
    """One adapter's part at a site: the adapted weight, the adapted bias if it is, the shapes of its tensors."""

    adapter: str
    weight: str
    bias: str | None
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class GroupFacts:
    """Sites that are alike in everything that a cost depends on, in model order."""

    sites: tuple[str, ...]
    kind: str
    out_features: int
    in_features: int
    count: int
    dtype: str
    terms: tuple[TermFacts, ...]
    calls: tuple[CallFacts, ...]


@dataclass(frozen=True)
class InsertedFacts:
    """What an adapter inserts beside weights: formulas and shapes of what stands in front, or of what takes a place.

    `kind` is a place (prompt, cache, attention), `tokens` for trained rows, `train` for trained copies.
    """

    adapter: str
    kind: str
    sites: tuple[str, ...]
    says: str
    formulas: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RefusalFacts:
    """What a pass left as it is: the pass, the site (empty where it is the model's own), a node there, and why."""

    made_by: str
    site: str
    node: str
    reason: str


@dataclass(frozen=True)
class TogetherFacts:
    """Adapters that are active together, in this order, the sites they reach, and what they insert beside those.

    `refusals` are what passes left as it is, or None where this was not asked. `regions` says which modules run graphs,
    and `untraced` why the whole model has no graph, empty where it has one or this was not asked.
    """

    adapters: tuple[str, ...]
    groups: tuple[GroupFacts, ...]
    inserted: tuple[InsertedFacts, ...] = ()
    refusals: tuple[RefusalFacts, ...] | None = None
    regions: Partition = field(default_factory=lambda: Partition("layers"))
    untraced: str = ""


@dataclass(frozen=True)
class ExplainFacts:
    """What `peftc explain` tells."""

    model: str
    architecture: str
    training: bool
    tokens: tuple[int, ...]
    together: tuple[TogetherFacts, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class EntryFacts:
    """One way to call an artifact: its name, the file, and by name the shape of each input and output.

    A size is a number or a sum of dimensions, such as "past + sequence". An input that is a dictionary of tensors has
    their number instead.
    """

    name: str
    file: str
    inputs: Mapping[str, tuple[int | str, ...] | int]
    outputs: Mapping[str, tuple[int | str, ...] | int]


@dataclass(frozen=True)
class ExportFacts:
    """What `peftc export` wrote: where and as what, which adapters, whether they are merged, inputs or routed.

    `weights` are those of merged adapters, by name. `dimensions` have a `min` and a `max` each (None: no limit). Of a
    checkpoint there are no entries and no drift.
    """

    directory: str
    format: str
    adapters: tuple[str, ...]
    placed: str
    files: tuple[str, ...]
    bytes: int
    entries: tuple[EntryFacts, ...] = ()
    dimensions: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    drift: OutputDrift | None = None
    tokenizer: bool = False
    generates: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)
