"""The class of adapted models of a class: what a call of one is, and what it is an instance of."""

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import peft as contract
from peftc.passes.foreign.hidden_states import ASKS_FOR_HIDDEN
from peftc.passes.foreign.peft_classes import model_class
from peftc.passes.foreign.transformers import GENERATION, USE_CACHE, forward_of, repeats_of, rows_of
from peftc.runtime.adapted.adapted_module import AdaptedModule, Root
from peftc.runtime.adapted.base_weights import COMPILED_CALLS, base_view
from peftc.runtime.adapted.routed_call import RoutedCall
from peftc.runtime.execution.uncached import is_recomputing, without_cache
from peftc.runtime.execution.virtual import EXTRA_INPUTS

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_KINDS: dict[type, Any] = {}
_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], Any] = {}


def adapted_class(base: type[nn.Module], root: type[Root]) -> type[Root]:
    """The class of adapted models of a class: named like it, with its forward signature, deriving from `root` too."""
    if (base, root) not in _CLASSES:
        _CLASSES[base, root] = _adapted_class(base, root)
    found: type[Root] = _CLASSES[base, root]
    return found


def _adapted_class(base: type[nn.Module], root: type[Root]) -> type[Root]:
    """The class of adapted models of a class: named like it, with its forward signature, deriving from `root` too."""
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())[1:]
    positional = tuple(
        each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    )
    known = frozenset(positional) | {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters)
    takes_cache = forward_of(base.forward).cache is not None
    makes_cache = takes_cache and (USE_CACHE in known or takes_more)

    def named(self: AdaptedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(positional):
            message = f"{base.__name__}.forward takes {len(positional)} positional arguments, {len(args)} were given"
            raise TypeError(message)
        arguments = dict(zip(positional, args, strict=False))
        for name, value in kwargs.items():
            if name in arguments:
                raise TypeError(f"{base.__name__}.forward got two values for {name!r}")
            earlier_name = takes_cache and isinstance(value, Cache)
            ours = name in EXTRA_INPUTS or name == contract.BY_ROW
            if name not in known and not takes_more and not ours and not earlier_name:
                raise TypeError(f"{base.__name__}.forward has no argument {name!r}")
            arguments[name] = value
        return arguments

    def forward(self: AdaptedModule, *args: Any, **kwargs: Any) -> Any:
        state = self._adapter_state
        by_task = contract.TASK_IDS in kwargs and not torch.compiler.is_compiling() and state.tasks
        if (contract.BY_ROW in kwargs and not self._takes_names) or by_task:
            return self._by_row(self.forward, args, kwargs, rows_of(self._named(args, kwargs)))
        if makes_cache and self.training and self.is_gradient_checkpointing and is_recomputing():
            args, kwargs = (), without_cache(self._named(args, kwargs))
        if state.rows.is_on:
            return by_row(self, args, kwargs)
        if (routed := state.inputs.now()) is not None:
            return by_input(self, routed, self._named(args, kwargs))
        if state.whole or any(name in kwargs for name in EXTRA_INPUTS) or (state.host.stored and _is_exporting()):
            return state.run_whole("", self._named(args, kwargs))
        if not torch.compiler.is_compiling():
            state.settle()
        with state.host.pinned() as tenant:
            output = plain(self, args, kwargs)
        if self.training:
            state.engine.penalise(output, tenant)
        return output

    def by_row(self: AdaptedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call whose rows have adapters of their own, which are pinned by now."""
        state = self._adapter_state
        if torch.compiler.is_compiling():
            return plain(self, args, kwargs)
        state.settle()
        output = plain(self, args, kwargs)
        if self.training:
            state.engine.penalise(output, state.host.now)
        return output

    def by_input(self: AdaptedModule, routed: RoutedCall, arguments: dict[str, Any]) -> Any:
        """A call whose tokens are given more or less of each adapter."""
        state = self._adapter_state
        if state.whole:
            message = "a routed call goes through the model in its own Python, and one graph of the whole is needed"
            fail(UsageError, "E538", message, help='choose regions="layers", or adapters of weights alone')
        state.settle()
        output = routed(lambda **given: plain(self, (), given), arguments)
        if self.training:
            state.engine.penalise(output, routed.tenant)
        return output

    def plain(self: AdaptedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The user's own forward, whose modules are regions."""
        # A container goes through everything that it holds, and is not to meet the adapters there.
        return base.forward(base_view(self) if isinstance(self, CONTAINERS) else self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__

    def reduce(self: AdaptedModule, _: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in COMPILED_CALLS}
        return _remade, (base, root), state

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "_named": named,
        "_call_names": known | ({ASKS_FOR_HIDDEN} if takes_more else set()),
        "_takes_names": contract.BY_ROW in known,
        "_base_class": base,
        "_root_class": root,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "generate"):
        namespace["generate"] = _generate(base)
    made: type[Root] = _kind_of(type(base))(base.__name__, (root, base), namespace)
    return made


def _generate(base: Any) -> Any:
    """Generation, whose `adapter_names` and `task_ids` hold for every call of the model in it."""

    @wraps(base.generate)
    def generate(self: AdaptedModule, *args: Any, **kwargs: Any) -> Any:
        if contract.BY_ROW not in kwargs and contract.TASK_IDS not in kwargs:
            if (routed := self._adapter_state.inputs.now()) is not None:
                kwargs = routed.generation(kwargs)
            return self._inherited("generate")(*args, **kwargs)
        count = rows_of({f"argument {place}": each for place, each in enumerate(args)} | kwargs)
        config = kwargs.get(GENERATION, getattr(self, GENERATION, None))
        return self._by_row(self._inherited("generate"), args, kwargs, count, repeats_of(kwargs, config))

    return generate


def _kind_of(kind: type) -> Any:
    """A class of classes whose objects are PEFT's models too, where PEFT is installed.

    Trainers ask for that by `isinstance` before they use what PEFT's models have. Theirs cannot be a base: it and
    transformers' models want their own bases in opposite orders. So it comes last, and nothing of it is found.
    """
    theirs = model_class()
    if theirs is None:
        return kind
    if kind not in _KINDS:

        def mro(cls: Any) -> list[type]:
            own = list(kind.mro(cls))  # type: ignore[call-arg]
            return own if theirs in own else [*own[:-1], hidden, theirs, object]

        names = [name for name in vars(theirs) if not name.startswith("__")]
        hidden = type("NotPefts", (), {name: _Missing(name) for name in names})

        _KINDS[kind] = type(kind.__name__, (kind,), {"mro": mro})
    return _KINDS[kind]


class _Missing:
    """An attribute that is not there, whatever a class further on has under its name."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError(f"{owner.__name__ if owner else 'the model'!r} has no attribute {self._name!r}")


def _remade(base: type[nn.Module], root: type[Root]) -> Root:
    """An object of an adapted class with nothing in it, for pickle to fill."""
    return object.__new__(adapted_class(base, root))


def _is_exporting() -> bool:
    """Whether torch.export goes through the forward, for which it has put something else in the place of weights."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
