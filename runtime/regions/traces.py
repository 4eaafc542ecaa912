"""Traces of one model's modules: one for modules alike and calls alike, made when a call first needs it."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import AdapterError, ModelError, fail
from peftc.runtime.regions.arguments import Arguments, pattern
from peftc.runtime.regions.kinds import fingerprint, indices
from peftc.runtime.regions.region import RegionCall, RegionTrace

WAYS = 256
"""How many traces a kind may have: one that is called with another number each time runs its own Python after that."""

EXACT = 16
"""After so many traces of one kind for calls alike but for their sizes, traces are bound to these."""

Make = Callable[[nn.Module, RegionCall], RegionTrace]


@dataclass(frozen=True, eq=False)
class Kept:
    """Traces for calls of one pattern of modules of one kind, the latest last, or why there can be none.

    A failure is of calls that keep gradients, or of those that do not.
    """

    traces: list[RegionTrace] = field(default_factory=list)
    failures: dict[bool, AdapterError] = field(default_factory=dict)


class Traces:
    """Finds or makes the trace that holds for a call of a module."""

    def __init__(self, make: Make):
        self._make = make
        self._kept: dict[Hashable, dict[Hashable, Kept]] = {}  # by kind of module, then by pattern of call
        self._ways: dict[Hashable, int] = {}
        self._full: dict[Hashable, str] = {}

    def find(
        self, module: nn.Module, arguments: Arguments, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> RegionTrace:
        """A trace that holds for a call: one that there is, of a module alike, or a new one.

        Raises ModelError where there can be none, now and whenever it is asked for the same again.
        """
        kind = fingerprint(module)
        shape = pattern(arguments.key)
        known = self._kept.setdefault(kind, {})
        kept = known.get(shape) or Kept()
        for trace in reversed(kept.traces):
            if trace.numbered and trace.numbers != indices(module):
                continue
            if trace.facts.gradients not in (None, torch.is_grad_enabled()):
                continue
            if trace.fits(arguments.tensors, arguments.cache, module):
                return trace
        gradients = torch.is_grad_enabled()
        if gradients in kept.failures:
            raise kept.failures[gradients]
        self._ways[kind] = ways = self._ways.get(kind, 0) + 1
        if ways > WAYS:
            fail(ModelError, "E465", self._too_many(kind, module), help="")
        known[shape] = kept
        numbered = any(each.numbered for each in kept.traces)
        call = RegionCall(args, kwargs, arguments.cache, exact=len(kept.traces) >= EXACT, numbered=numbered)
        try:
            made = self._made(module, call)
        except AdapterError as error:
            kept.failures[gradients] = error
            raise
        kept.traces.append(made)
        return made

    def count(self, kind: Hashable) -> int:
        """How many traces there are so far of modules of a kind, as `kinds.fingerprint` tells them apart."""
        return sum(len(each.traces) for each in self._of(kind))

    def failures(self, kind: Hashable) -> tuple[str, ...]:
        """Why calls of modules of a kind had no trace so far, each reason once."""
        errors = (each for kept in self._of(kind) for each in list(kept.failures.values()))
        full = (self._full[kind],) if kind in self._full else ()
        return tuple(dict.fromkeys((*(each.diagnostics[0].message for each in errors), *full)))

    def _of(self, kind: Hashable) -> list[Kept]:
        return list(self._kept.get(kind, {}).values())  # another thread may trace meanwhile

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._ways.clear()
        self._full.clear()

    def _too_many(self, kind: Hashable, module: nn.Module) -> str:
        return self._full.setdefault(kind, f"{type(module).__name__} is called in more than {WAYS} ways")

    def _made(self, module: nn.Module, call: RegionCall) -> RegionTrace:
        made = self._make(module, call)
        if made.numbered and not call.numbered:
            call = replace(call, numbered=True)
            made = self._make(module, call)
        return replace(made, numbered=True, numbers=indices(module)) if call.numbered else made
