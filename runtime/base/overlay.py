"""The base to be read: a model with some tensors and modules in the place of its own, of which nothing is changed."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftc.passes.quantized.schemes.known import Packed, packed, packed_modules
from peftc.passes.quantized.schemes.packing import shallow
from peftc.runtime.base.replaced import Replaced
from peftc.runtime.base.share import share

BANK = "adapter_bank"  # the module of an adapted model that holds adapters' tensors


@dataclass(frozen=True, eq=False)
class Overlay:
    """A model of the user's class, with these in place of its own, by full names.

    Where a module takes another's place, tensors inside it may be replaced after it; None takes a bias away. It is for
    whoever looks and keeps nothing: it shares what it does not replace with the model, and sees no later change.
    """

    model: nn.Module
    replaced: Replaced = field(default_factory=dict)

    @cached_property
    def module(self) -> nn.Module:
        """The model that there would be. Modules that hold nothing replaced are the model's own."""
        return _overlaid(self.model, self.replaced) if self.replaced else self.model

    @cached_property
    def packed(self) -> Mapping[str, Packed]:
        """Every module that stores its weight packed, by name."""
        return packed_modules(self.module)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of the state. What is packed is as it is stored."""
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor):
                yield from _plain(name, tensor)

    def value(self, name: str) -> torch.Tensor | None:
        """The tensor of a name; of a weight that is stored packed, its value, unpacked at every call."""
        path, _, leaf = name.rpartition(".")
        module = self._modules.get(path) if leaf == "weight" else None
        held = None if module is None else packed(module)
        return self._tensors.get(name) if held is None else held.unpack()

    def identity(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors that say which base it is.

        Of a packed weight these are the codes: scales may be rounded later, as bitsandbytes does on some CPUs when a
        model is first called.
        """
        for name, tensor in self.tensors():
            if name.endswith(".bias") or not _inside(name, self.packed):
                yield name, tensor
        for name, held in self.packed.items():
            yield f"{name}.weight", held.parts[0]

    def quantization(self) -> str | None:
        """What users call the way in which weights are packed, such as "nf4"; None where none is."""
        return ", ".join(sorted({held.packing.label for held in self.packed.values()})) or None

    def copy(self) -> nn.Module:
        """A model of its own over the same storage, to be kept: see `share`."""
        return share(self.model, replaced=self.replaced)

    @cached_property
    def _tensors(self) -> Mapping[str, torch.Tensor]:
        return dict(self.tensors())

    @cached_property
    def _modules(self) -> Mapping[str, nn.Module]:
        return dict(self.module.named_modules(remove_duplicate=False))


def is_adapters(name: str) -> bool:
    """Whether a parameter or module belongs to the adapters."""
    return name == BANK or name.startswith(f"{BANK}.")


def _overlaid(model: nn.Module, replaced: Replaced) -> nn.Module:
    """The model as another tree of modules: those that hold something else, or such a module, are other objects."""
    others: dict[int, nn.Module] = {}  # in place of a module

    def other(module: nn.Module) -> nn.Module:
        if id(module) not in others:
            held = packed(module)
            others[id(module)] = shallow(module) if held is None else held.scheme.share(module)
        return others[id(module)]

    for name, value in replaced.items():
        owner, _, leaf = name.rpartition(".")
        module = model
        for part in filter(None, owner.split(".")):
            module = _child(others.get(id(module), module), part)
        own = other(module)
        if isinstance(value, nn.Module):
            training = _child(own, leaf).training
            own._modules[leaf] = value
            if value.training is not training:
                other(value).training = training
        elif leaf in own._parameters:
            given = value is None or isinstance(value, nn.Parameter)
            own._parameters[leaf] = value if given else nn.Parameter(value, requires_grad=False)  # type: ignore[arg-type,assignment]
        else:
            own._buffers[leaf] = value
    linked: dict[int, nn.Module] = {}

    def with_others(module: nn.Module) -> nn.Module:
        if id(module) not in linked:
            held = others.get(id(module), module)
            below = {name: child if child is None else with_others(child) for name, child in held._modules.items()}
            if any(child is not below[name] for name, child in held._modules.items()):
                held = other(module)
                held._modules.update(below)
            linked[id(module)] = held
        return linked[id(module)]

    return with_others(model)


def _child(module: nn.Module, name: str) -> nn.Module:
    found = module._modules[name]
    assert found is not None
    return found


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or those that one of a quantization library's is made of: what it stands for is not stored."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            yield f"{name}.{inner}", getattr(tensor, inner)
    else:
        yield name, tensor


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{each}.") for each in modules)
