"""Inputs against the manifest: compiled machine code checks nothing, and other programs speak of guards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, UsageError, did_you_mean, fail
from peftc.runtime.artifact.manifest import AGAIN, ArtifactManifest, Dimension, Entry, Size, TensorFacts, TensorGroup

ROUTE = "adapter_ids"
NOBODY = -1  # there, of a row that has none of the adapters
_TOTAL = ("past", "sequence")  # what a row has in all


@dataclass(frozen=True)
class _Place:
    """Where the size of a dimension is read: an axis of an input, less what else is in that sum."""

    name: str
    axis: int
    rest: Size


class Checks:
    """The checks of one entry. What all is well with costs one comparison of a shape an input."""

    def __init__(self, entry: Entry, manifest: ArtifactManifest):
        self.entry, self.dimensions = entry, dict(manifest.dimensions)
        self.length = manifest.length
        self.adapters = manifest.adapter_names if manifest.adapters == "routed" else ()
        self.lowest = NOBODY if manifest.has_base else 0
        self.plain = [each for each in entry.inputs if isinstance(each, TensorFacts)]
        self.groups = [each for each in entry.inputs if isinstance(each, TensorGroup)]
        self.names = frozenset(each.name for each in entry.inputs)
        self.inner = {each.name: frozenset(inner.name for inner in each.tensors) for each in self.groups}
        # One adapter serves every entry, and not every entry uses all of it: a decode has no encoder.
        self.outer = {name: _anywhere(name, manifest) for name in self.inner}
        self.places = _places(self.plain)
        for each in self.plain:
            if not {name for size in each.shape for name in size.dimensions} <= set(self.places):
                message = f"entry '{entry.name}': nothing tells the size of {_shown(each)} of input '{each.name}'"
                fail(CheckpointError, "E603", message, help=AGAIN)
        self.ranges = [(name, each.min, each.max) for name, each in self.dimensions.items() if name in self.places]
        self.ranks = {each.name: len(each.shape) for each in self.plain}
        # Most inputs are of few shapes (all keys and values of a cache), whose sizes are then added up once.
        self.shapes = list(dict.fromkeys(each.shape for each in self.plain))
        numbers = {shape: index for index, shape in enumerate(self.shapes)}
        self.rows = [(each.name, dtype_of(each), numbers[each.shape]) for each in self.plain]
        self.group_rows = [
            (
                group.name,
                [(each.name, dtype_of(each), tuple(size.number for size in each.shape)) for each in group.tensors],
            )
            for group in self.groups
        ]

    def __call__(self, inputs: Mapping[str, Any]) -> None:
        """Raise a UsageError for the first input that the program was not made for (E611 to E615)."""
        if not self._fit(inputs):
            self._explain(inputs)

    def _fit(self, inputs: Mapping[str, Any]) -> bool:
        if inputs.keys() != self.names:
            return False
        sizes: dict[str, int] = {}
        for dimension, place in self.places.items():
            tensor = inputs[place.name]
            if not isinstance(tensor, Tensor) or tensor.dim() != self.ranks[place.name]:
                return False
            sizes[dimension] = tensor.shape[place.axis] - place.rest.value(sizes)
        shapes = [tuple([each.value(sizes) for each in shape]) for shape in self.shapes]
        for name, dtype, index in self.rows:
            tensor = inputs[name]
            if not isinstance(tensor, Tensor) or tensor.dtype is not dtype or tensor.shape != shapes[index]:
                return False
        for name, least, most in self.ranges:
            if sizes[name] < least or (most is not None and sizes[name] > most):
                return False
        for name, rows in self.group_rows:
            group = inputs[name]
            if not isinstance(group, Mapping) or not self.inner[name] <= group.keys() <= self.outer[name]:
                return False
            for inner, dtype, shape in rows:
                tensor = group[inner]
                if not isinstance(tensor, Tensor) or tensor.dtype is not dtype or tensor.shape != shape:
                    return False
        return self._total(sizes) and self._routes(inputs)

    def _total(self, sizes: Mapping[str, int]) -> bool:
        return self.length is None or sum(sizes.get(each, 0) for each in _TOTAL) <= self.length

    def _routes(self, inputs: Mapping[str, Any]) -> bool:
        if not self.adapters or ROUTE not in self.names or not inputs[ROUTE].numel():
            return True
        least, most = torch.aminmax(inputs[ROUTE])
        return int(least) >= self.lowest and int(most) < len(self.adapters)

    # --- what is wrong, once something is ---

    def _explain(self, inputs: Mapping[str, Any]) -> NoReturn:
        self._explain_names(inputs)
        for each in self.plain:
            self._explain_type(each, inputs[each.name], f"input '{each.name}'")
        for group in self.groups:
            self._explain_group(group, inputs[group.name])
        sizes = self._explain_shapes(inputs)
        for name, size in sizes.items():
            self._explain_range(name, size, self.dimensions[name])
        if not self._total(sizes):
            total = " + ".join(each for each in _TOTAL if each in sizes)
            self._fail("E614", f"{total} is {sum(sizes.get(each, 0) for each in _TOTAL)}, at most {self.length}")
        names = ", ".join(f"{index} {name}" for index, name in enumerate(self.adapters))
        names = f"{NOBODY} for none, {names}" if self.lowest else names
        found = inputs[ROUTE].tolist()
        self._fail("E615", f"input '{ROUTE}' is {found}, and there are {len(self.adapters)} adapters", names)

    def _explain_names(self, inputs: Mapping[str, Any]) -> None:
        for name in inputs:
            if name not in self.names:
                help = did_you_mean(str(name), self.names) or f"the inputs are {_some(self.names)}"
                self._fail("E611", f"there is no input '{name}'", help)
        missing = [each.name for each in self.entry.inputs if each.name not in inputs]
        if missing:
            self._fail("E611", f"missing input{'s' * (len(missing) > 1)}: {_some(missing)}")

    def _explain_type(self, facts: TensorFacts, value: object, what: str) -> None:
        if not isinstance(value, Tensor):
            self._fail("E612", f"{what} is a {type(value).__name__}, not a tensor")
        if value.dtype is not dtype_of(facts):
            self._fail("E612", f"{what} is of type {str(value.dtype).removeprefix('torch.')}, expected {facts.dtype}")
        if value.dim() != len(facts.shape):
            self._fail("E613", f"{what} has shape {list(value.shape)}, expected {_shown(facts)}")

    def _explain_group(self, group: TensorGroup, value: object) -> None:
        if not isinstance(value, Mapping):
            self._fail("E612", f"input '{group.name}' is a {type(value).__name__}, not a dict of tensors")
        for name in value:
            if name not in self.outer[group.name]:
                help = did_you_mean(str(name), self.outer[group.name])
                self._fail("E611", f"input '{group.name}' has no tensor '{name}'", help)
        missing = [each.name for each in group.tensors if each.name not in value]
        if missing:
            self._fail("E611", f"input '{group.name}' lacks {_some(missing)}", "is it an adapter of the same layout?")
        for each in group.tensors:
            what = f"'{each.name}' of input '{group.name}'"
            self._explain_type(each, value[each.name], what)
            found = list(value[each.name].shape)
            if found != [size.number for size in each.shape]:
                self._fail("E613", f"{what} has shape {found}, expected {_shown(each)}")

    def _explain_shapes(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, place in self.places.items():
            sizes[name] = inputs[place.name].shape[place.axis] - place.rest.value(sizes)
        for each in self.plain:
            found, wanted = list(inputs[each.name].shape), [size.value(sizes) for size in each.shape]
            if found != wanted:
                wrong = [size for size, got, want in zip(each.shape, found, wanted, strict=True) if got != want]
                names = dict.fromkeys(name for size in wrong for name in size.dimensions)
                help = "; ".join(f"'{name}' is {sizes[name]}, as in input '{self.places[name].name}'" for name in names)
                shown = f" = {wanted}" if any(size.dimensions for size in each.shape) else ""
                message = f"input '{each.name}' has shape {found}, expected {_shown(each)}{shown}"
                self._fail("E613", message, help)
        return sizes

    def _explain_range(self, name: str, size: int, limits: Dimension) -> None:
        where = f"it is the size of an axis of input '{self.places[name].name}'"
        if size < limits.min:
            self._fail("E614", f"'{name}' is {size}, at least {limits.min}", where)
        if limits.max is not None and size > limits.max:
            self._fail("E614", f"'{name}' is {size}, at most {limits.max}", where)

    def _fail(self, code: str, message: str, help: str = "") -> NoReturn:
        fail(UsageError, code, message, help=help, where=self.entry.name)


def dtype_of(facts: TensorFacts) -> torch.dtype:
    """The type of a tensor, as torch's own."""
    dtype = getattr(torch, facts.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _anywhere(group: str, manifest: ArtifactManifest) -> frozenset[str]:
    """The tensors that any entry takes in this dict."""
    inputs = [each for entry in manifest.entries.values() for each in entry.inputs if each.name == group]
    return frozenset(inner.name for each in inputs if isinstance(each, TensorGroup) for inner in each.tensors)


def _places(inputs: list[TensorFacts]) -> dict[str, _Place]:
    """For every dimension an axis to read it from: one of that size alone, or else one where the rest is known."""
    found: dict[str, _Place] = {}
    axes = [(each.name, axis, size) for each in inputs for axis, size in enumerate(each.shape)]
    for most in (1, 2, 3):
        for name, axis, size in axes:
            unknown = [each for each in size.dimensions if each not in found]
            if len(size.dimensions) <= most and len(unknown) == 1:
                known = tuple(each for each in size.dimensions if each not in unknown)
                found[unknown[0]] = _Place(name, axis, Size(known, size.number))
    return found


def _shown(facts: TensorFacts) -> str:
    return f"[{', '.join(map(str, facts.shape))}]"


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
