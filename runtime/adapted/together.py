"""Which adapters can be active together."""

import math
from collections.abc import Mapping, Sequence

import torch

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.method.rule import COMPATIBLE
from peftc.passes.plan.plan import ParamKey
from peftc.passes.plan.site import WHOLE
from peftc.passes.plan.structure import weighted
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapters.bank import AdapterParameters

Named = str | Sequence[str] | Mapping[str, float]
"""Adapters as callers mean them: one, several in order, or several with weights."""


def as_active(names: Named, usual: Mapping[str, float] | None = None) -> Active:
    """The adapters that are meant, in order, with their weights: where none is said the usual one, or else one.

    Raises UsageError (E513) for a weight that is no number; whether there are such adapters is not looked at.
    """
    if isinstance(names, Mapping):
        return tuple((name, _number(name, weight)) for name, weight in names.items())
    known = usual or {}
    return tuple((name, known.get(name, 1.0)) for name in ([names] if isinstance(names, str) else names))


def _number(name: str, weight: object) -> float:
    try:
        return float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        fail(UsageError, "E513", f"adapter {name!r} is given the weight {weight!r}", help="give it a number")


def check_together(active: Active, adapters: Sequence[AdapterParameters]) -> None:
    """Raise UsageError where these cannot be active in this order and with these weights: a name twice, a weight that a
    method cannot carry, two that train the same tensor or token, virtual tokens of different kinds.
    """
    names = [name for name, _ in active]
    for name in names:
        if names.count(name) > 1:
            fail(UsageError, "E512", f"adapter {name!r} is activated twice", help="give it one weight")
    _check_fronts(active, adapters)
    for name, weight in active:
        if not math.isfinite(weight):
            fail(UsageError, "E513", f"adapter {name!r} is given the weight {weight}", help="give it a finite number")
    copied: dict[str, str] = {}
    for (name, weight), adapter in zip(active, adapters, strict=True):
        for at in adapter.plan.sites:
            in_cache = at.site.kind == "cache"
            if weight != 1.0 and not in_cache and weighted(at.bound.weight, at.bound.bias)[1] is None:
                message = f"method {at.bound.rule.name!r} of adapter {name!r} cannot be weighted"
                fail(UsageError, "E513", message, help="give it weight 1")
        for copy in adapter.plan.copies:
            if copy.read:
                continue
            if weight != 1.0:
                message = f"adapter {name!r} trains {copy.module} as a whole, which cannot be weighted"
                fail(UsageError, "E513", message, help="give it weight 1")
            for tensor, _, _ in copy.tensors:
                for full in copy.names(tensor):
                    if full in copied:
                        message = f"adapters {copied[full]!r} and {name!r} both train their own {full}"
                        fail(UsageError, "E514", message, help="activate one of them at a time")
                    copied[full] = name
    _check_read(adapters)
    _check_rows(active, adapters, copied)


def _check_read(adapters: Sequence[AdapterParameters]) -> None:
    """Raise UsageError where adapters hold other tensors of the base, and not the same."""
    held: dict[str, tuple[str, torch.Tensor]] = {}
    for adapter in adapters:
        name = adapter.plan.name
        for copy in adapter.plan.copies:
            for tensor, _, _ in copy.tensors if copy.read else ():
                own = adapter.tensor(ParamKey(name, copy.module, tensor))
                for full in copy.names(tensor):
                    other, before = held.setdefault(full, (name, own))
                    if before is not own and not torch.equal(before, own):
                        message = f"adapters {other!r} and {name!r} were each made for another {full}"
                        fail(UsageError, "E514", message, help="activate one of them at a time")


def _check_rows(active: Active, adapters: Sequence[AdapterParameters], copied: Mapping[str, str]) -> None:
    trained: dict[tuple[str, int], str] = {}
    for (name, weight), adapter in zip(active, adapters, strict=True):
        for rows in adapter.plan.rows:
            if weight != 1.0:
                message = f"adapter {name!r} trains tokens of {rows.module}, whose rows cannot be weighted"
                fail(UsageError, "E513", message, help="give it weight 1")
            for module in rows.modules:
                other = copied.get(f"{module}.weight")
                if other is not None:
                    message = f"adapter {name!r} trains tokens of {module}, and {other!r} the whole of it"
                    fail(UsageError, "E559", message, help="activate one of them at a time")
                shared = [each for each in rows.ids if (module, each) in trained]
                if shared:
                    what = f"token{'s' * (len(shared) > 1)} {', '.join(map(str, shared[:8]))}"
                    what += ", ..." if len(shared) > 8 else ""
                    other = trained[module, shared[0]]
                    message = f"adapters {other!r} and {name!r} both train {what} of {module}"
                    fail(UsageError, "E558", message, help="activate one of them at a time")
                trained |= {(module, each): name for each in rows.ids}


def _check_fronts(active: Active, adapters: Sequence[AdapterParameters]) -> None:
    """Raise UsageError where virtual tokens of different kinds, or counted in different ways, would stand in a row."""
    first: dict[str, tuple[str, bool]] = {}
    for (name, weight), adapter in zip(active, adapters, strict=True):
        for at in adapter.plan.sites:
            if at.bound.prompt is None or at.site.kind not in WHOLE:
                continue
            compatible = bool(dict(at.bound.values).get(COMPATIBLE, False))
            for kind, (other, counted) in first.items():
                message = f"adapters {other!r} and {name!r} both put virtual tokens in front"
                if kind != at.site.kind:
                    help = "which of them comes first is not said: activate one of them at a time"
                    fail(UsageError, "E564", f"{message}, one of the cache and one of the text", help=help)
                if counted is not compatible:
                    fail(UsageError, "E564", f"{message}, and differ in '{COMPATIBLE}'", help="give both the same")
            first.setdefault(at.site.kind, (name, compatible))
            if at.site.kind == "cache" and not 0 <= weight < math.inf:
                message = f"attention to the prefix of adapter {name!r} cannot be multiplied by {weight:g}"
                fail(UsageError, "E513", message, help="activate it with a weight from 0 on")
            if at.site.kind != "cache" and weight != 1.0:
                message = f"adapter {name!r} puts virtual tokens in front, which cannot be weighted"
                fail(UsageError, "E513", message, help="give it weight 1")
