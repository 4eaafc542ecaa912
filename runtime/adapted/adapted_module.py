"""A model whose calls run as graphs: what torch and transformers ask of any model, whether or not it has adapters."""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.eval_frame import skip_code
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.passes.foreign import peft as contract
from peftc.passes.foreign.transformers import rows_of, text_of
from peftc.passes.quantized.schemes.known import packed
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapted.base_weights import COMPILED_CALLS, STATE
from peftc.runtime.base.overlay import BANK, is_adapters
from peftc.runtime.base.share import placement
from peftc.runtime.execution.engine import COMPILED
from peftc.runtime.execution.segments import OPTIONS, Recompute, layer_names
from peftc.runtime.execution.storage import check_trainable, without_packed
from peftc.runtime.execution.virtual import EXTRA_INPUTS
from peftc.runtime.regions.modules import layers_become_regions

Root = TypeVar("Root", bound="AdaptedModule")


class AdaptedModule(nn.Module):
    """An object of the user's class too, whose forward is graphs of the base with the active adapters in them.

    It shares the storage of the user's weights. What it has of its own is in an `AdapterSet`; `adapted_class` says what
    a call of the user's class is.
    """

    supports_gradient_checkpointing = True
    lone_is_default = True  # whether a lone adapter is saved as the one called `default` is, whatever its name
    _adapter_state: AdapterSet
    _base_class: type[nn.Module]
    _root_class: "type[AdaptedModule]"
    _call_names: frozenset[str]  # the arguments of calls of the user's class
    _takes_names: bool  # whether the user's class has an argument called `adapter_names`
    _named: Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]  # a call's arguments, by name

    @property
    def base_class(self) -> type[nn.Module]:
        """The user's model class."""
        return self._base_class

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder, adapted: `generate` runs it on its own."""
        encoder = self._inherited("get_encoder")(*args, **kwargs)
        if not self._adapter_state.whole:
            return encoder
        for path, module in self.named_modules():
            if module is encoder and path:
                return EntryPoint(self, path, module)
        return encoder

    @property
    def create_masks_for_generate(self) -> Callable[..., Any]:
        """What makes masks for caches with buffers: one graph of the whole model makes its own from the mask as it is.

        Otherwise it is the user's class's; raises AttributeError, as transformers expects, where that has none.
        """
        if self._adapter_state.whole:
            return lambda *, attention_mask=None, **_: attention_mask
        return self._inherited("create_masks_for_generate")

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """The call itself, unless a compiler was asked for: `generate` compiles by itself for caches with buffers, for
        sizes that stay, and in one graph of the whole model they follow the tokens.
        """
        if compile_config is None and self._adapter_state.whole:
            return self.__call__
        return self._inherited("get_compiled_call")(compile_config)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; afterwards the model is traced anew. Refused where an adapter holds the embedding's size."""
        if self._adapter_state.displaced:
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

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`: in place."""
        compiled = torch.compile(self._call_impl, *args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._infer_parameters(self, args, kwargs)
            return compiled(*args, **kwargs)

        self._compiled_call_impl = call

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. A state of adapters alone, loaded with `strict=False`, does not miss the base.

        Base values that differ from the user's do not overwrite them: this model gets tensors of its own for these.
        Raises UsageError where they are those of a weight that is stored packed.
        """
        state_dict = without_packed(self, state_dict)
        base = self._adapter_state.base
        changed = [*base.changed_since(), *base.differing(state_dict)]
        _unshare(self, state_dict)
        try:
            result = self._inherited("load_state_dict")(state_dict, strict=strict, assign=assign)
        finally:
            base.place(changed)
        if not strict and all(is_adapters(key) for key in state_dict):
            result.missing_keys[:] = [key for key in result.missing_keys if is_adapters(key)]
        if assign:
            self._adapter_state.refresh()
        return result

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As torch's, for every parameter. A base that is to be trained gets storage of its own first.

        Raises UsageError where weights are stored packed: they cannot be trained.
        """
        if requires_grad:
            check_trainable(self)
            _unshare(self, None)
        self._inherited("requires_grad_")(requires_grad)
        return self

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """From now on, keep only what goes into a layer in training, and compute the layer again in the backward pass.

        As transformers' method of that name, and Trainer's `gradient_checkpointing`: losses and gradients stay as they
        are, random numbers included. Each repeated layer of the model (those transformers marks, else the members of
        its ModuleLists) runs under `torch.utils.checkpoint.checkpoint(use_reentrant=False)`; a layer that changes
        buffers as it runs, like a batch norm, is left alone. No cache is made, as in transformers; layers that are
        given one of the caller's run once, and a warning tells so. Without gradients, and in evaluation, nothing
        changes; nor does it under torch.compile, which has a partitioner of its own that decides what to recompute.

        Args:
            gradient_checkpointing_kwargs: `preserve_rng_state`, `context_fn`, `determinism_check`, `debug` and
                `early_stop`, as torch has them. A warning tells that `use_reentrant=True` is not followed.
            every_n_layers: recompute only every so many layers.
            offload: keep what goes into the layers in host memory.

        Raises:
            UsageError: an unknown option (E560), a count that is none (E561), a model without repeated layers (E562).
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            message = "use_reentrant=True is not followed: layers are recomputed the other way, with the same gradients"
            warnings.warn(message, stacklevel=2)
        for name in options:
            if name not in OPTIONS:
                help = did_you_mean(name, sorted(OPTIONS)) or f"known are use_reentrant, {', '.join(sorted(OPTIONS))}"
                fail(UsageError, "E560", f"gradient checkpointing has no option {name!r}", help=help)
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
            message = f"every_n_layers is {every_n_layers!r}"
            fail(UsageError, "E561", message, help="give how many layers share one that is recomputed, 1 for all")
        if not layer_names(self):
            message = f"{type(self).__name__} has no repeated layers to recompute"
            fail(UsageError, "E562", message, help="put its layers into a torch.nn.ModuleList")
        recompute = Recompute(every_n_layers, bool(offload), tuple(sorted(options.items())))
        layers_become_regions(self, self._adapter_state.host)
        self._adapter_state.engine.recompute = recompute

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._adapter_state.engine.recompute = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in training."""
        return self._adapter_state.engine.recompute is not None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable`, by transformers' newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable`, by transformers' newer name."""
        self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing`, by transformers' newer name."""
        return self.is_gradient_checkpointing

    # --- what torch and transformers call themselves ---

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. With `adapter_names` every row of the call has an adapter of its own, with `task_ids` a task:
        see `RowAdapters`.
        """
        asked = contract.BY_ROW in kwargs or contract.TASK_IDS in kwargs
        if not asked and not self._adapter_state.rows.is_on:
            return super().__call__(*args, **kwargs)
        return self._by_row(super().__call__, args, kwargs, rows_of(self._named(args, kwargs)))

    def _by_row(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        count: int | None,
        repeats: frozenset[int] = frozenset(),
    ) -> Any:
        """Call something whose rows have the adapters that `adapter_names` says, and the tasks that `task_ids` does."""
        rows = self._adapter_state.rows
        names = None if self._takes_names else kwargs.pop(contract.BY_ROW, None)
        tasks = rows.tasks_in(kwargs, names)
        compiling = get_eval_frame_callback() is not None or self._compiled_call_impl is not None
        if names is None and tasks is None and not rows.is_on:
            return function(*args, **kwargs)
        if self._adapter_state.inputs.is_on:
            said = contract.TASK_IDS if names is None else contract.BY_ROW
            message = f"a route weighs the adapters of each token, and '{said}' says it of rows"
            fail(UsageError, "E538", message, help="take the route away first: set_route(None)")
        if (names is not None or tasks is not None) and (text := text_of(self, kwargs)):
            within = [name for name, each in self.named_modules() if any(each is one for one in text)]
            rows.check_within(names, tasks, count, within)
        before = rows.enter(names, count, compiling=compiling, repeats=repeats, tasks=tasks)
        try:
            return function(*args, **kwargs)
        finally:
            rows.leave(before)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As transformers, for `generate`; what adapters take of a call is no mistake."""
        own = {name: value for name, value in model_kwargs.items() if name not in EXTRA_INPUTS}
        self._inherited("_validate_model_kwargs")(own)

    # torch.compile asks a module with these two, a lazy module, to make itself ready before it traces a call: that is
    # when a signature met for the first time is traced. `nn.modules.lazy` has the protocol.

    def _initialize_hook(self) -> None: ...

    def _infer_parameters(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        engine = self._adapter_state.engine
        if self._adapter_state.whole:
            engine.program(engine.call("", self._named(args, kwargs or {})), COMPILED)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        base = self._adapter_state.base
        before, changed = placement(self), base.changed_since()
        self._inherited("_apply")(fn, recurse)
        base.apply(fn, changed)
        if placement(self) != before:
            self._adapter_state.engine.reset()
        self._adapter_state.refresh()
        return self

    def train(self, mode: bool = True) -> Self:
        """As torch's."""
        self._inherited("train")(mode)
        if self._adapter_state.room:  # what is trained from now on has no room for other ranks
            self._adapter_state.make_room(self._adapter_state.room)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._adapter_state.refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Self = object.__new__(type(self))  # a class's own `__new__` may be for making another
        memo[id(self)] = copied
        for module in [*self.modules(), *self._adapter_state.displaced.values()]:
            held = packed(module) if isinstance(module, nn.Module) else None
            if held is not None and id(held.module) not in memo:
                # A library's own copy refers to the original, or holds what it shares twice.
                memo[id(held.module)] = held.scheme.share(copy.deepcopy(held.module, memo))
        for name, value in self.__dict__.items():
            if name != STATE and name not in COMPILED_CALLS:
                copied.__dict__[name] = copy.deepcopy(value, memo)
        copied.__dict__[STATE] = self._adapter_state.copy_for(copied, memo)
        return copied

    def _base_parameters(self) -> list[nn.Parameter]:
        adapters = {id(each) for each in self.get_submodule(BANK).parameters()}
        return [each for each in self.parameters() if id(each) not in adapters]

    def _inherited(self, name: str) -> Any:
        """A method of the user's class, bound to this model: what there would be if none of ours stood before it."""
        classes = type(self).__mro__
        return getattr(super(classes[classes.index(self._base_class) - 1], self), name)


# A compiler begins with the forward: which adapters the rows have is nothing that it is to make a graph for.
skip_code(AdaptedModule.__call__.__code__)
skip_code(AdaptedModule._by_row.__code__)


class EntryPoint:
    """A submodule of an adapted model, called through its graph; everything else is the submodule's own."""

    def __init__(self, model: AdaptedModule, path: str, module: nn.Module):
        self._model, self._path, self._module = model, path, module
        self.__signature__ = inspect.signature(module.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the submodule, adapters included."""
        extra = {name: kwargs.pop(name) for name in EXTRA_INPUTS if name in kwargs}
        bound = self.__signature__.bind(*args, **kwargs).arguments
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        return self._model._adapter_state.run_whole(self._path, bound | extra)

    __call__ = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _unshare(model: nn.Module, state_dict: Mapping[str, Any] | None) -> None:
    """Give the model tensors of its own where a state dict (None: training) will change what it shares; ties stay."""
    base = [
        (name, each)
        for name, each in model.named_parameters(remove_duplicate=False)
        if not is_adapters(name) and not is_traceable_wrapper_subclass(each)  # packed, and seen to be the same
    ]
    own = {
        id(each): nn.Parameter(each.detach().clone(), requires_grad=each.requires_grad)
        for name, each in base
        if state_dict is None
        or (
            isinstance(given := state_dict.get(name), torch.Tensor)
            and given.shape == each.shape
            and not torch.equal(given.to(each), each)
        )
    }
    for name, each in base:
        if id(each) in own:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = own[id(each)]
