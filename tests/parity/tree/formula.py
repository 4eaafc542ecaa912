"""Low-rank adapters by their formula in a plain model: `W + s * B @ A`, and what an adapted model has around it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Active = tuple[tuple[str, float], ...]


@dataclass
class Adapter:
    """The tensors of an adapter: two for each site, by its path, and tensors of its own in place of some."""

    scale: float
    dropout: float
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]
    copies: dict[str, nn.Parameter] = field(default_factory=dict)

    def named(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Path, role and tensor."""
        for path, (a, b) in self.pairs.items():
            yield path, "A", a
            yield path, "B", b
        for name, tensor in self.copies.items():
            path, _, leaf = name.rpartition(".")
            yield path, leaf, tensor

    def kept(self) -> "Adapter":
        """The same values, whatever becomes of these: what is merged, which nothing trains."""
        kept = copy.deepcopy(self)
        for _, _, tensor in kept.named():
            tensor.requires_grad_(False)
        return kept


@dataclass(frozen=True)
class Term:
    """What one adapter adds to the output of a module."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: float

    def of(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """For this input."""
        if isinstance(module, nn.Embedding):
            return functional.embedding(x, self.a.T) @ self.b.T * self.scale
        x = functional.dropout(x.to(self.a.dtype), self.dropout, module.training)
        if isinstance(module, nn.Conv2d):
            inner = functional.conv2d(x, self.a, None, module.stride, module.padding, module.dilation)
            return functional.conv2d(inner, self.b) * self.scale
        return x @ self.a.T @ self.b.T * self.scale

    def weight(self, module: nn.Module) -> torch.Tensor:
        """Added to the module's weight."""
        rank = self.a.shape[0]
        added = (self.b.flatten(1) @ self.a.reshape(rank, -1)) * self.scale
        if not isinstance(module, nn.Linear | nn.Conv2d):  # embeddings, and the linears of GPT-2
            added = added.T
        return added.reshape(module.weight.shape)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def serving(module: nn.Module) -> Any:
    """The module, with a forward that has adapters: `terms` beside its weight, and `instead` in place of its own."""
    base = type(module)
    if "terms" not in vars(module):
        if base not in _CLASSES:

            def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
                own = dict(self._parameters)
                try:
                    self._parameters.update(self.instead)
                    output = base.forward(self, x)
                finally:
                    self._parameters.update(own)
                for term in self.terms:
                    output = output + term.of(self, x)
                return output

            _CLASSES[base] = type(base.__name__, (base,), {"forward": forward})
        module.__class__ = _CLASSES[base]
        vars(module).update(terms=[], instead={})
    return module


class Reference:
    """A plain model with adapters by their formula, and what is active, at rest and merged."""

    def __init__(self, base: nn.Module):
        self.model: Any = copy.deepcopy(base).requires_grad_(False)
        self.adapters: dict[str, Adapter] = {}
        self.trained: set[str] = set()
        self.frozen: set[str] = set()  # not to be trained, which is more than not trained now
        self.active: Active = ()
        self.enabled = True
        self.merged: Mapping[str, tuple[float, Adapter]] | None = None
        self.merged_into: Mapping[str, nn.Module] = {}

    def refresh(self) -> None:
        """Let the model be as everything says."""
        for module in self.model.modules():
            if "terms" in vars(module):
                vars(module).update(terms=[], instead={})
        for name, adapter in self.adapters.items():
            for _, _, tensor in adapter.named():
                tensor.requires_grad_(name in self.trained)
        if not self.enabled:
            return
        if self.merged is not None:
            for weight, adapter in self.merged.values():
                self._merge(adapter, weight)
            return
        for name, weight in self.active:
            adapter = self.adapters[name]
            for _, module, term in self._terms(adapter, weight):
                serving(module).terms.append(term)
            self._copies(adapter)

    def _terms(self, adapter: Adapter, weight: float) -> Iterator[tuple[str, nn.Module, Term]]:
        for path, (a, b) in adapter.pairs.items():
            yield path, self.model.get_submodule(path), Term(a, b, adapter.scale * weight, adapter.dropout)

    @torch.no_grad()
    def _merge(self, adapter: Adapter, weight: float) -> None:
        self._copies(adapter, merged=True)
        for path, module, term in self._terms(adapter, weight):
            if self.merged_into[path] is not module:
                continue  # it was put there since
            held = serving(module)
            before = held.instead.get("weight", held.weight)
            held.instead["weight"] = nn.Parameter(before + term.weight(module), requires_grad=False)

    def _copies(self, adapter: Adapter, *, merged: bool = False) -> None:
        for name, tensor in adapter.copies.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if not merged or self.merged_into[path] is module:
                serving(module).instead[leaf] = tensor

    # --- what users do ---

    def add(self, name: str, adapter: Adapter, *, active: bool, trained: bool) -> None:
        """Add one, beside the others or active alone."""
        self.adapters[name] = adapter
        if active:
            self.merged = None
            self.activate(((name, 1.0),), trained)
        else:
            self.trained -= {name}
            self.trained |= {name} if trained else set()
            self.frozen |= set() if trained else {name}
            if not self.active:
                self.activate(((name, 1.0),), trained)
        self.refresh()

    def activate(self, active: Active, trained: bool | None = None) -> None:
        """Have these active; `trained` None leaves which are trained as it is."""
        self.active = active
        if trained is not None:
            names = {name for name, _ in active}
            self.trained = names if trained else set()
            self.frozen = self.frozen - names if trained else self.frozen | names
        self.refresh()

    def merge(self, names: Sequence[str] | None) -> None:
        """Put these, or the active ones, into the weights as they are now."""
        weights = dict(self.active)
        names = list(weights) if names is None else names
        self.merged = {name: (weights.get(name, 1.0), self.adapters[name].kept()) for name in names}
        paths = {path for _, each in self.merged.values() for path, _, _ in each.named()}
        self.merged_into = {path: self.model.get_submodule(path) for path in paths}
        self.refresh()

    def unmerge(self) -> None:
        """Take out what is merged."""
        self.merged = None
        self.refresh()

    def remove(self, name: str) -> None:
        """Take an adapter away; where none is active any more that was, the first of the others by name is.

        It is trained if what was active was, unless it is frozen.
        """
        trained = any(each in self.trained for each, _ in self.active)
        del self.adapters[name]
        self.trained.discard(name)
        self.frozen.discard(name)
        left = tuple(each for each in self.active if each[0] != name)
        if self.active and not left and self.adapters:
            first = min(self.adapters)
            self.trained |= {first} if trained and first not in self.frozen else set()
            left = ((first, 1.0),)
        self.active = left
        self.refresh()

    def to(self, dtype: torch.dtype) -> None:
        """Have everything in another type."""
        self.model.to(dtype)
        kept = [] if self.merged is None else [adapter for _, adapter in self.merged.values()]
        for adapter in (*self.adapters.values(), *kept):
            for _, _, tensor in adapter.named():
                tensor.data = tensor.data.to(dtype)
        self.refresh()

    def served(self, active: Active) -> "Reference":
        """A copy with these in its weights."""
        copied = copy.copy(self)
        copied.model = copy.deepcopy(self.model)
        copied.merged, copied.enabled, copied.active = None, True, active
        if active:
            copied.merge(None)
        copied.refresh()
        return copied


def changed(adapter: Adapter, **values: Any) -> Adapter:
    """The same with other fields."""
    return replace(adapter, **values)
