"""The adapted model: the user's model class with its forward replaced by graphs."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.quantized.schemes.known import packed
from peftc.runtime.base.base import BANK
from peftc.runtime.base.kbit import widened_tensors
from peftc.runtime.base.share import placement, share
from peftc.runtime.execution.engine import COMPILED
from peftc.runtime.execution.virtual import EXTRA_INPUTS
from peftc.runtime.merge.merge import Replaced, put
from peftc.runtime.model.allocating import Allocating
from peftc.runtime.model.kv_prefix import KvPrefix
from peftc.runtime.model.lifecycle import Lifecycle
from peftc.runtime.model.recomputing import Recomputing
from peftc.runtime.model.saving import Saving
from peftc.runtime.model.state import AdapterState

STATE = "_adapter_state"
ADAPTED = contract.HAS_ADAPTERS
COMPILED_CALLS = ("_compiled", "_compiled_call_impl", "_compiled_call")  # bound to this model, no other
Root = TypeVar("Root", bound="AdaptedModel")


class AdaptedModel(Lifecycle, Saving, Allocating, Recomputing, KvPrefix):
    """A model with adapters in its graph. Made by `peftc.compiler.apply` and `load`, never directly.

    It is an instance of the user's model class too, with the same forward signature and output class, and shares the
    storage of the user's weights. Its parameters are the base's, frozen, and the adapters', under `adapter_bank`.
    """

    _base_class: type[nn.Module]

    @property
    def base_class(self) -> type[nn.Module]:
        """The user's model class."""
        return self._base_class

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder, adapted: `generate` runs it on its own."""
        encoder = self._inherited("get_encoder")(*args, **kwargs)
        for path, module in self.named_modules():
            if module is encoder and path:
                return EntryPoint(self, path, module)
        return encoder

    def create_masks_for_generate(self, *, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """The mask as it is: `generate` asks for finished ones for caches with buffers, and graphs make their own."""
        return attention_mask

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """The call itself, unless a compiler was asked for: `generate` compiles by itself for caches with buffers, for
        sizes that stay, and here they follow the tokens.
        """
        return self.__call__ if compile_config is None else self._inherited("get_compiled_call")(compile_config)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; afterwards the model is traced anew. Refused where an adapter holds the embedding's size."""
        if self._adapter_state.merged:
            fail(UsageError, "E530", "a merged model cannot be resized", help="call unmerge_adapter first")
        resized = [self._inherited(f"get_{each}_embeddings")() for each in ("input", "output")]
        for name, plan in self._adapter_state.plans().items():
            held = [at.site.module for at in plan.sites if at.site.kind in ("embedding", "linear")]
            held += [copy.module for copy in plan.copies]
            for module in held:
                found = self.get_submodule(module)
                if any(each is not None and each in found.modules() for each in resized):
                    message = f"adapter {name!r} adapts {module} and has its present size"
                    fail(UsageError, "E530", message, help="resize the model before the adapter is added")
        result = self._inherited("resize_token_embeddings")(*args, **kwargs)
        for parameter in self._base_parameters():
            parameter.requires_grad_(False)
        self._adapter_state.engine.reset()
        return result

    def _enlarge(self, size: int, *, drawn: bool = True) -> None:
        """Make room for new tokens, here and not in the user's model; `drawn` if somebody may read their rows."""
        facts = self._adapter_state.facts
        before = facts.fingerprint or self.base_fingerprint()
        self.resize_token_embeddings(size, mean_resizing=drawn)
        facts.fingerprint = before

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`: in place."""
        self._compiled = torch.compile(self, *args, **kwargs)
        self._compiled_call_impl = lambda *call, **named: self._compiled(*call, **named)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As transformers, for `generate`; what adapters take of a call is no mistake."""
        own = {name: value for name, value in model_kwargs.items() if name not in EXTRA_INPUTS}
        self._inherited("_validate_model_kwargs")(own)

    # torch.compile asks a module with these two, a lazy module, to make itself ready before it traces a call: that is
    # when a signature met for the first time is traced. `nn.modules.lazy` has the protocol.

    def _initialize_hook(self) -> None: ...

    def _infer_parameters(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        engine = self._adapter_state.engine
        engine.program(engine.call("", self._named(args, kwargs or {})), COMPILED)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "AdaptedModel":
        before = placement(self)
        self._inherited("_apply")(fn, recurse)
        state: AdapterState = self._adapter_state
        if placement(self) != before:
            state.engine.reset()
        state.refresh()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdaptedModel":
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        for module in [*self.modules(), *self._adapter_state.merged.values()]:
            held = packed(module) if isinstance(module, nn.Module) else None
            if held is not None and id(held.module) not in memo:
                # A library's own copy refers to the original, or holds what it shares twice.
                memo[id(held.module)] = held.scheme.share(copy.deepcopy(held.module, memo))
        for name, value in self.__dict__.items():
            if name != STATE and name not in COMPILED_CALLS:
                copied.__dict__[name] = copy.deepcopy(value, memo)
        copied.__dict__[STATE] = self._adapter_state.copy_for(copied, memo)
        return copied

    def _plain(self, tensors: Replaced) -> nn.Module:
        """A model of the user's class over this one's weights, with these in the place of some."""
        with self._holding(tensors):
            return share(base_view(self))

    def _widen(self) -> None:
        """Hold what a quantized base has beside its packed weights in float32, as training wants it."""
        state: AdapterState = self._adapter_state
        before = put(self, widened_tensors(base_view(self)))
        if before:
            types = {name: each.dtype for name, each in before.items() if isinstance(each, torch.Tensor)}
            state.widened = {**types, **state.widened}
            state.engine.reset()

    def _base_parameters(self) -> list[nn.Parameter]:
        adapters = {id(each) for each in self.get_submodule(BANK).parameters()}
        return [each for each in self.parameters() if id(each) not in adapters]

    def _inherited(self, name: str) -> Callable[..., Any]:
        """A method of the user's class, bound to this model."""
        return getattr(super(Saving, self), name)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        raise AssertionError("only classes that adapted_class makes have instances")


class EntryPoint:
    """A submodule of an adapted model, called through its graph; everything else is the submodule's own."""

    def __init__(self, model: AdaptedModel, path: str, module: nn.Module):
        self._model, self._path, self._module = model, path, module
        self.__signature__ = inspect.signature(module.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the submodule, adapters included."""
        extra = {name: kwargs.pop(name) for name in EXTRA_INPUTS if name in kwargs}
        bound = self.__signature__.bind(*args, **kwargs).arguments
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        return self._model._adapter_state.engine.run(self._path, bound | extra)

    __call__ = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def adapted_class(base: type[nn.Module], root: type[Root]) -> type[Root]:
    """The class of adapted models of a class: named like it, with its forward signature, deriving from `root` too."""
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())[1:]
    positional = tuple(
        each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    )
    known = frozenset(positional) | {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters)

    def named(self: AdaptedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(positional):
            message = f"{base.__name__}.forward takes {len(positional)} positional arguments, {len(args)} were given"
            raise TypeError(message)
        arguments = dict(zip(positional, args, strict=False))
        for name, value in kwargs.items():
            if name in arguments:
                raise TypeError(f"{base.__name__}.forward got two values for {name!r}")
            if name not in known and not takes_more and name not in EXTRA_INPUTS:
                raise TypeError(f"{base.__name__}.forward has no argument {name!r}")
            arguments[name] = value
        return arguments

    def forward(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
        return self._adapter_state.engine.run("", self._named(args, kwargs))

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    namespace = {
        "forward": forward,
        "_named": named,
        "_base_class": base,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (root, base), namespace)


def base_view(model: AdaptedModel) -> nn.Module:
    """The model as an object of the user's class: the same modules, without the adapters. Not to be kept."""
    view = object.__new__(model.base_class)
    view.__dict__.update({name: value for name, value in model.__dict__.items() if name not in (STATE, ADAPTED)})
    view.__dict__["_modules"] = {name: module for name, module in model._modules.items() if name != BANK}
    for name in COMPILED_CALLS:
        view.__dict__.pop(name, None)
    return view
