"""What an adapted model says of itself by PEFT's names: which module has which adapters, and in what state they are."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peftc.grammar.diagnostics import ArgumentTypeError, fail
from peftc.passes.foreign import peft as contract
from peftc.passes.foreign.peft_classes import tuner_name
from peftc.passes.plan.plain import plain_class
from peftc.passes.plan.plan import ROWS, AdapterPlan, ParamKey
from peftc.passes.plan.site import WHOLE
from peftc.passes.quantized.schemes.known import packed
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapters.bank import AdapterParameters

Mixed = Literal["irregular"]
"""What is said where places differ."""


class Names(list[str]):
    """Names of adapters: a list, as in PEFT, that may also be called for itself, as transformers' method is."""

    def __call__(self) -> list[str]:
        """The names."""
        return list(self)


class Name(str):
    """The name of an adapter, that may also be called for itself."""

    def __call__(self) -> str:
        """The name."""
        return str(self)


@dataclass
class TunerLayerStatus:
    """One adapted module, with the fields of PEFT's class of this name.

    `name` begins with `model.`, as PEFT's does; `module_type` is the method and the module's class. `requires_grad` and
    `devices` are by adapter.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapted modules together, with the fields of PEFT's class of this name."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Mixed | None


def layer_status(state: AdapterSet) -> list[TunerLayerStatus]:
    """Every adapted module, in the model's order. Raises ArgumentTypeError where an adapter adapts no module."""
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    kinds: dict[str, str] = {}
    for name, plan in state.plans().items():
        for module, kind, tensors in _modules(state.adapter(name), plan):
            found.setdefault(module, {}).setdefault(name, []).extend(tensors)
            kinds.setdefault(module, kind)
    order = [name for name, _ in state.base.model.named_modules() if name in found]
    merged = [name for name, _ in state.base.merged_adapters]
    return [
        TunerLayerStatus(
            name=f"model.{module}" if module else "model",
            module_type=f"{kinds[module]}.{plain_class(held).__name__}",
            enabled=state.enabled,
            active_adapters=[
                name for name, _ in state.active if kinds[module] != contract.TRAINED_MODULES or name in found[module]
            ],
            merged_adapters=[name for name in merged if name in found[module]],
            requires_grad={name: _same([each.requires_grad for each in own]) for name, own in found[module].items()},
            available_adapters=sorted(found[module]),
            devices={name: sorted({each.device.type for each in own}) for name, own in found[module].items()},
            quantization_backend=None if (stored := packed(held)) is None else stored.scheme.name,
        )
        for module in order
        for held in (state.base.model.get_submodule(module),)
    ]


def model_status(state: AdapterSet, counts: tuple[int, int]) -> TunerModelStatus:
    """The model as a whole, its trained and all parameters counted. Raises ArgumentTypeError as `layer_status`."""
    layers, plans = layer_status(state), state.plans()
    kinds = {name: plan.spec.rule.peft_type or contract.OWN_TYPE for name, plan in plans.items()}
    backends = {each.quantization_backend for each in layers}
    return TunerModelStatus(
        base_model_type=plain_class(state.base.model).__name__,
        adapter_model_type=tuner_name(tuple(kinds.values())),
        peft_types=kinds,
        trainable_params=counts[0],
        total_params=counts[1],
        num_adapter_layers=len(layers),
        enabled=state.enabled,
        active_adapters=[name for name, _ in state.active],
        merged_adapters=[name for name, _ in state.base.merged_adapters],
        requires_grad={
            name: _same([each.requires_grad[name] for each in layers if name in each.requires_grad]) for name in plans
        },
        available_adapters=sorted(plans),
        devices={name: sorted({kind for each in layers for kind in each.devices.get(name, ())}) for name in plans},
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular" if backends else None,
    )


Adapted = tuple[str, str, list[torch.Tensor]]
"""A module, what adapts it, and the adapter's parameters there."""


def _modules(adapter: AdapterParameters, plan: AdapterPlan) -> Iterator[Adapted]:
    name, method = plan.name, plan.spec.rule.name
    if any(at.site.kind in WHOLE for at in plan.sites):
        message = f"adapter {name!r} ({method}) adapts no module, so there is no status of one"
        fail(ArgumentTypeError, "E587", message, help="ask for the trained numbers: get_nb_trainable_parameters()")
    held = dict(adapter.items())

    def trained(keys: Iterable[ParamKey]) -> list[torch.Tensor]:
        return [held[key] for key in keys if isinstance(held[key], nn.Parameter)]

    for at in plan.sites:
        yield at.site.module, method, trained(at.key(name, each) for each in at.bound.params)
    for copy in plan.copies:
        if not copy.is_bias:
            keys = [ParamKey(name, copy.module, each) for each, _, _ in copy.tensors]
            yield copy.module, contract.TRAINED_MODULES, trained(keys)
    for rows in plan.rows:
        yield rows.module, contract.TRAINED_TOKENS, trained([ParamKey(name, rows.module, ROWS)])


def _same(values: Sequence[bool | Mixed]) -> bool | Mixed:
    first = values[0] if values else False
    return first if all(each == first for each in values) else "irregular"
