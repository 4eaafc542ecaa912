"""A region: one module of an adapted model, its programs, and when it runs none of them."""

import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.cache_utils import Cache

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.ir.traced import Traced
from peftc.runtime.execution import nest
from peftc.runtime.execution.program import Guard, guard_of
from peftc.runtime.execution.segments import Recompute
from peftc.runtime.mixed_batch.gates import Gates
from peftc.runtime.mixed_batch.row_pieces import RowPieces
from peftc.runtime.regions.arguments import Arguments, OpaqueError, taken
from peftc.runtime.regions.kinds import indices
from peftc.runtime.regions.owned import run_with
from peftc.runtime.regions.template import Code
from peftc.runtime.regions.watch import Facts, Holds

KEPT = 256
"""How many calls of different sizes a region remembers the program of."""


@dataclass(frozen=True)
class Update:
    """One update of a cache: the attribute, below the region, that has the layer's number in it, or the number.

    `tokens` is how many tokens are new, `sizes` are those of what the cache gives for keys and for values: numbers,
    inputs with an axis, or None for what the cache alone knows.
    """

    index: str | int
    tokens: "_Size" = None
    sizes: "tuple[tuple[_Size, ...], ...]" = ()


_Size = tuple[int, int] | int | None


@dataclass(frozen=True)
class RegionCall:
    """A call to trace a module for. `exact` binds every size; `numbered` lets a layer know its own number."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cache: Cache | None = None
    exact: bool = False
    numbered: bool = False


@dataclass(frozen=True, eq=False)
class RegionTrace:
    """A module's graph, what was taken for granted, and whether the module's own number went into it."""

    traced: Traced
    facts: Facts
    updates: tuple[Update, ...] = ()
    numbered: bool = False
    numbers: Hashable = None
    _guard: Guard | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_guard", guard_of(self.traced.guards))

    def fits(self, tensors: Sequence[torch.Tensor], cache: Cache | None, module: nn.Module) -> bool:
        """Whether the trace holds for tensors of these sizes and what the cache holds."""
        sizes: list[Sequence[int]] = [each.shape for each in tensors]
        for own, bound in zip(sizes, self.traced.shapes, strict=False):
            if any(size is not None and size != has for has, size in zip(own, bound, strict=True)):
                return False
        if self._guard is None:
            return True
        for update in self.updates:
            sizes += _given(update, sizes[: len(tensors)], cache, module)
        return self._guard(sizes)


def _given(
    update: Update, sizes: Sequence[Sequence[int]], cache: Cache | None, module: nn.Module
) -> Iterator[tuple[int, ...]]:
    """The sizes of what a cache will give."""
    number = update.index
    if isinstance(number, str):
        owner, _, name = number.rpartition(".")
        number = int(vars(module.get_submodule(owner))[name])

    def known(size: _Size) -> int:
        if isinstance(size, tuple):
            return sizes[size[0]][size[1]]
        return -1 if size is None else size

    assert cache is not None
    length = int(cache.get_mask_sizes(known(update.tokens), number)[0])
    for own in update.sizes:
        yield tuple(length if axis == 2 else known(size) for axis, size in enumerate(own))


@dataclass(frozen=True, eq=False)
class Bound:
    """A program of one module."""

    code: Code
    form: nest.Form
    single: bool  # whether the output is one tensor
    cached: bool  # whether it takes the cache
    holds: Holds
    trace: RegionTrace | None = None
    gates: Gates | None = None  # where tokens are given more or less of the adapters

    def serves(self, arguments: Arguments, module: nn.Module) -> bool:
        """Whether it is right for a call that differs in sizes from the one that it was made for."""
        assert self.trace is not None
        return self.holds() and self.trace.fits(arguments.tensors, arguments.cache, module)

    def __call__(self, arguments: Arguments, recompute: Recompute | None = None) -> Any:
        """Run it, and put the output together as the module would have."""
        code = self.code
        if self.gates is not None:
            self.gates.check(arguments.tensors)
        if code.pieces is not None:
            if isinstance(code.pieces, RowPieces):
                code.pieces.check(arguments.tensors)
            code.pieces.refresh()
        if self.cached:
            leaves = code.function(code.root, *arguments.tensors, arguments.cache)
        elif recompute is None or code.writes:
            leaves = code.function(code.root, *arguments.tensors)
        else:
            leaves = recompute.run(code.frozen(), tuple(arguments.tensors))
        return leaves[0] if self.single else nest.rebuild(self.form, list(leaves), arguments.cache)


class Inlined(nn.Module):
    """A graph with the module's own kind of output, for a compiler to trace."""

    def __init__(self, graph: nn.Module, form: nest.Form):
        super().__init__()
        self.graph, self.form = graph, form

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Call it."""
        return nest.rebuild(self.form, list(self.graph(*tensors)))


@dataclass(frozen=True, eq=False)
class Split:
    """Why a module runs its own Python for some call, its children their programs."""

    reason: str
    holds: Holds

    def serves(self, arguments: Arguments, module: nn.Module) -> bool:
        """Whether it is right for a call that differs in sizes from the one that it was made for."""
        return self.holds()


Programs = dict[Hashable, Bound | Split]

_CACHED = "layers that are given a cache are not recomputed (gradient checkpointing): call with use_cache=False"


class Host(Protocol):
    """What regions of one model share."""

    @property
    def recompute(self) -> Recompute | None:
        """How layers are computed again in the backward pass, if they are."""
        ...

    def pinned(self, tenant: Any = None) -> AbstractContextManager[Any]:
        """Inside, and in this thread, modules are served with these adapters."""
        ...

    def local(self, path: str) -> Any:
        """What the active adapters have inside of a module, with its programs by call."""
        ...

    def program(
        self,
        region: "Region",
        local: Any,
        alike: Hashable,
        arguments: Arguments,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Bound | Split:
        """The program for a call, made now if there is none; or why there is none. Calls of one key may share it."""
        ...

    def own_weights(self, region: "Region", local: Any, reason: str) -> Mapping[str, torch.Tensor]:
        """The adapted tensors of a module's own, for its Python to run with. Raises ModelError where it cannot."""
        ...

    def inlined(self, region: "Region", tensors: Sequence[torch.Tensor], names: tuple[str, ...]) -> Any:
        """What an adapted module gives for these tensors, the last of them by name, while torch traces it."""
        ...

    def graph(self, region: "Region", form: Any, names: tuple[str, ...]) -> nn.Module:
        """The graph of an adapted module for a compiler, which reads adapters from slots."""
        ...


class Region:
    """One module as the adapted model calls it.

    With active adapters inside it runs a program, if one can be made for the call; else the user's own forward, whose
    calls of submodules are regions in turn.
    """

    def __init__(self, host: Host, path: str, module: nn.Module, plain: Callable[..., Any]):
        self.host, self.path, self.module, self.plain = host, path, module, plain
        self.owned, self.structure = False, 0  # whether weights of its own are adapted now, and by what
        self.layer: int | None = None  # which of the model's repeated layers it is
        self.why = ""  # why it begins here; empty where one around it has to be split first
        self.opaque: dict[str, None] = {}  # why it was split that no trace could tell, each once
        self.number = next(iter(indices(module)), ("", "", None))[2]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module."""
        if torch.compiler.is_compiling():
            return self._inlined(args, kwargs)
        local, recompute = self.host.local(self.path), None
        if self.layer is not None and self.host.recompute is not None:
            recompute = self._recompute(args, kwargs)
        if local.part is None:
            return self._plain(self.plain, local, args, kwargs, recompute)
        try:
            arguments = taken(args, kwargs)
        except OpaqueError as error:
            why = f"it is called with {error}"
            self.opaque[why] = None
            return self._split(local, why, args, kwargs, recompute)
        if arguments.cache is not None:
            arguments.key.append(self._is_empty(arguments.cache))
        key = (*arguments.key, torch.is_grad_enabled(), torch.is_autocast_enabled(arguments.device))
        program = local.programs.get(key)
        if program is None or not program.holds():
            program = self._found(local, key, arguments, args, kwargs)
        if isinstance(program, Split):
            return self._split(local, program.reason, args, kwargs, recompute)
        return program(arguments, recompute)

    def _found(
        self, local: Any, key: tuple[Any, ...], arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Bound | Split:
        """A program that serves calls alike, as those of a text that grows are, or what the host finds."""
        kind = arguments.alike(key)
        alike: list[Bound | Split] = local.alike.setdefault(kind, [])
        found = next((each for each in alike if each.serves(arguments, self.module)), None)
        if found is None:
            found = self.host.program(self, local, kind, arguments, args, kwargs)
            alike[:] = [found, *alike[: KEPT - 1]]
        if len(local.programs) >= KEPT:
            local.programs.clear()
        local.programs[key] = found
        return found

    def _inlined(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """For a compiler that traces the call: the user's own code, and graphs of adapted modules in it."""
        if not self.owned:
            return self.plain(*args, **kwargs)
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        if len(given) != len(args) + len(kwargs):
            message = f"{self.path} holds adapted weights, and a compiler can have it called with tensors only"
            fail(ModelError, "E465", message, help="give the module tensors, or choose other sites")
        form = tuple((each.dim(), each.dtype) for each in given)
        if torch.compiler.is_dynamo_compiling():
            return getattr(self, self.prepared(self.structure, form, tuple(kwargs)))(*given)
        return self.host.inlined(self, given, tuple(kwargs))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def prepared(self, structure: int, form: Any, names: Any) -> str:
        """The attribute that has the graph for tensors of this form, which is made now if there is none.

        `structure` says which adapters it is of. A compiler takes the answer for a constant, and guards the attribute.
        """
        name = f"graph_{structure}_{self.module.training}_{zlib.crc32(repr((form, names)).encode()):08x}"
        if name not in vars(self):
            vars(self)[name] = self.host.graph(self, form, names)
        return name

    def _is_empty(self, cache: Cache) -> bool:
        """Whether the module's layer of a cache has seen no token, as far as that can be told without waiting."""
        layers = getattr(cache, "layers", None)
        if layers is None or self.number is None or self.number >= len(layers):
            return True
        layer = layers[self.number]
        if not getattr(layer, "is_initialized", False):
            return True
        keys = getattr(layer, "keys", None)
        return isinstance(keys, torch.Tensor) and keys.dim() > 1 and keys.shape[-2] == 0

    def _split(
        self,
        local: Any,
        reason: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recompute: Recompute | None = None,
    ) -> Any:
        def plain(*args: Any, **kwargs: Any) -> Any:
            values = self.host.own_weights(self, local, reason)
            return run_with(self.module, values, args, kwargs) if values else self.plain(*args, **kwargs)

        return self._plain(plain, local, args, kwargs, recompute)

    def _plain(
        self,
        plain: Callable[..., Any],
        local: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recompute: Recompute | None,
    ) -> Any:
        """The user's own forward; what it calls again in the backward pass is served with the adapters of now."""
        if recompute is None:
            return plain(*args, **kwargs)
        count, names, as_now = len(args), tuple(kwargs), local.tenant.as_now()

        def again(*values: Any) -> Any:
            with self.host.pinned(local.tenant), as_now():
                return plain(*values[:count], **dict(zip(names, values[count:], strict=True)))

        return recompute.run(again, (*args, *kwargs.values()))

    def _recompute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recompute | None:
        """How this call is to be computed again in the backward pass, if it is.

        One that is given a cache is not: the cache would take its keys and values twice.
        """
        found = self.host.recompute
        if found is None or not self.module.training or not torch.is_grad_enabled() or self.layer is None:
            return None
        cached = any(isinstance(each, Cache) for each in (*args, *kwargs.values()))
        if cached:
            warnings.warn(_CACHED, stacklevel=2)
        # A forward of Python's may write to what it holds, as batch norms do.
        writes = any(isinstance(each, _BatchNorm) and each.training for each in self.module.modules())
        return None if cached or writes or self.layer % found.every else found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Region | None":
        return None

    def __reduce__(self) -> Any:
        return (_nothing, ())


def _nothing() -> None:
    return None
