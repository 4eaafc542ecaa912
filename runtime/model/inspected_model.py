"""What an adapted model tells of its adapters, by the names that PEFT's users know."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.quantized.schemes.known import parameter_count
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.model.saving import adapter_config
from peftc.runtime.model.status import (
    Name,
    Names,
    TunerLayerStatus,
    TunerModelStatus,
    layer_status,
    model_status,
)
from peftc.runtime.peft_config.config_object import config_object
from peftc.runtime.regions.partition import Partition
from peftc.runtime.routing.classifier import ScalingClassifier
from peftc.runtime.routing.saved_route import route_config

_WHOLE: "WeakKeyDictionary[nn.Module, InspectedModel]" = WeakKeyDictionary()
_CLASSES: dict[type[nn.Module], Any] = {}


def _with_model(kind: type[nn.Module]) -> Any:
    """A class of modules whose `model` is the adapted model that they are of, and which have what that has."""
    if kind not in _CLASSES:

        def found(self: Any, name: str) -> Any:
            try:
                return kind.__getattr__(self, name)
            except AttributeError:
                whole = _WHOLE.get(self)
                hidden = name.startswith("_") or _is_users_property(type(whole), name)
                if whole is None or hidden or name not in dir(whole):
                    raise
                return getattr(whole, name)

        def model(self: Any) -> nn.Module:
            whole = _WHOLE.get(self)
            if whole is None:  # a copy
                raise AttributeError(f"{kind.__name__!r} object has no attribute 'model'")
            return whole.get_base_model()

        make: Any = type(kind)
        namespace = {"model": property(model), "__getattr__": found, "__module__": kind.__module__}
        _CLASSES[kind] = make(kind.__name__, (kind,), namespace)
    return _CLASSES[kind]


def _is_users_property(kind: type, name: str) -> bool:
    """Whether an attribute is a property of a user's class, which may ask its `base_model` in turn."""
    owner = next((each for each in kind.__mro__ if name in vars(each)), None)
    return owner is not None and isinstance(vars(owner)[name], property) and not owner.__module__.startswith("peftc.")


class InspectedModel(AdaptedModule):
    """An adapted model that can be asked which adapters it has, what they are and in what state."""

    @property
    def active_adapters(self) -> Names:
        """The names of the active adapters, in order. It may also be called, as transformers' method is."""
        return Names(name for name, _ in self._adapter_state.active)

    @property
    def active_adapter(self) -> Name | Names:
        """The name of the active adapter, or all of them where there is not one. It may also be called."""
        names = self.active_adapters
        return Name(names[0]) if len(names) == 1 else names

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a call runs adapters: some are active, and they are not disabled."""
        return self._adapter_state.enabled and bool(self._adapter_state.active)

    @property
    def peft_config(self) -> dict[str, Any]:
        """Every adapter's configuration, by name: of PEFT's classes where it is installed and has the method.

        They say what the adapters are; that of a classifier that chooses from them is among them. Another value in one
        changes no adapter: `add_adapter` makes one of it. Raises CheckpointError for an adapter that PEFT's format has
        no words for.
        """
        state = self._adapter_state
        for name, plan in state.plans().items():
            if name not in state.configs or state.configs[name][0] is not plan:
                fields = adapter_config(self, state.adapter(name))
                config = config_object(fields | {"inference_mode": not state.adapter(name).is_trainable})
                state.configs[name] = plan, config
        state.shown_configs.clear()
        state.shown_configs.update({name: state.configs[name][1] for name in state.names()})
        if state.routed is not None and isinstance(classifier := state.routed.route, ScalingClassifier):
            name = state.routed.name
            if name not in state.configs or state.configs[name][0] is not classifier:
                state.configs[name] = classifier, config_object(route_config(classifier, classifier.sources))
            state.shown_configs[name] = state.configs[name][1]
        return state.shown_configs

    @property
    def active_peft_config(self) -> Any:
        """The configuration of the active adapter, of several the first. Raises UsageError if none is active."""
        active = self._adapter_state.active
        if not active:
            fail(UsageError, "E588", "no adapter is active, so none has a configuration", help="call set_adapter first")
        return self.peft_config[active[0][0]]

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every adapted module: which adapters it has, which are active, merged and trained, and where.

        Raises ArgumentTypeError for prompts and prefixes, which adapt no module.
        """
        return layer_status(self._adapter_state)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the model: its adapters, what they train, which are active and merged.

        Raises ArgumentTypeError for prompts and prefixes, which adapt no module.
        """
        return model_status(self._adapter_state, self.get_nb_trainable_parameters())

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The type of the base's weights, as its own `dtype` says; None where it does not."""
        found = getattr(self, "dtype", None)
        return found if isinstance(found, torch.dtype) else None

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all, as PEFT counts: packed or not."""
        trainable = sum(each.numel() for each in self.parameters() if each.requires_grad)
        return trainable, parameter_count(self)

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's format."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def adapter_plan(self, adapter_name: str) -> AdapterPlan:
        """Which rule with which values an adapter puts where. Raises UsageError for an unknown name."""
        return self._adapter_state.adapter(adapter_name).plan

    def region_partition(self) -> Partition:
        """Which modules run graphs as the model stands, why they begin there, and what is split and why.

        It may be printed. Nothing is traced: what is attached to modules is seen at once, what cannot be traced when a
        call has tried. Without active adapters (none, at rest, merged) there are no regions but of weights that are
        stored packed.
        """
        return self._adapter_state.partition()

    def unload(self) -> nn.Module:
        """A plain model of the user's class without adapters, sharing this model's weights."""
        return self._adapter_state.base.unloaded()

    def get_base_model(self) -> nn.Module:
        """This very model as an object of the user's class, adapters in its modules, as PEFT's method gives it.

        What is set on it is set on this one. `unload` gives a model without adapters.
        """
        view: nn.Module = object.__new__(self._base_class)
        view.__dict__ = self.__dict__
        return view

    @property
    def base_model(self) -> Any:
        """The model without its head, as transformers has it; its `model`, which PEFT's users ask for, is all of it.

        A model of transformers' without a head is its own.
        """
        if "base_model" in self._modules:
            return self._modules["base_model"]
        of_transformers = hasattr(self._base_class, "base_model")
        inner: nn.Module = self._inherited("base_model") if of_transformers else self
        if (inner is self and of_transformers) or "model" in inner._modules:  # which asks whether a model is its own
            return inner
        view: nn.Module = object.__new__(_with_model(type(inner)))
        view.__dict__ = inner.__dict__
        _WHOLE[view] = self
        return view

    def base_fingerprint(self) -> str:
        """A digest of the base's names, shapes and sampled contents, without what is merged or room for new tokens."""
        return self._adapter_state.base.fingerprint()
