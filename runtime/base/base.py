"""The base inside an adapted model: its tensors as they are without what is merged into them."""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftc.passes.quantized.schemes.known import Packed, packed, packed_modules
from peftc.runtime.merge.merge import Replaced

BANK = "adapter_bank"  # the module of an adapted model that holds adapters' tensors


def base_tensors(model: nn.Module, merged: Replaced) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the base's state, without the adapters'. What is packed is as it is stored."""
    modules = {name: each for name, each in merged.items() if isinstance(each, nn.Module)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = merged.get(name, tensor)
        if isinstance(own, torch.Tensor) and not is_adapters(name) and not _inside(name, modules):
            yield from _plain(name, own)
    for name, module in modules.items():
        for key, tensor in module.state_dict(prefix=f"{name}.", keep_vars=True).items():
            own = merged.get(key)
            yield from _plain(key, own if isinstance(own, torch.Tensor) else tensor)


def base_values(model: nn.Module, merged: Replaced) -> Callable[[str], torch.Tensor | None]:
    """The base's own tensor of a name; of a weight that is stored packed, its value, unpacked at every call."""
    tensors = dict(base_tensors(model, merged))
    modules = dict(model.named_modules(remove_duplicate=False))

    def value(name: str) -> torch.Tensor | None:
        path, _, leaf = name.rpartition(".")
        replaced = merged.get(path)
        module = replaced if isinstance(replaced, nn.Module) else modules.get(path)
        held = packed(module) if leaf == "weight" and module is not None else None
        return tensors.get(name) if held is None else held.unpack()

    return value


def base_packed(model: nn.Module, merged: Replaced) -> dict[str, Packed]:
    """Every module of the base that stores its weight packed, by name."""
    found = ((name, packed(each)) for name, each in merged.items() if isinstance(each, nn.Module))
    return {**packed_modules(model), **{name: each for name, each in found if each is not None}}


def identity(model: nn.Module, merged: Replaced) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the base that say which one it is.

    Of a packed weight these are the codes: scales may be rounded later, as bitsandbytes does on some CPUs when a model
    is first called.
    """
    held = base_packed(model, merged)
    for name, tensor in base_tensors(model, merged):
        if name.endswith(".bias") or not _inside(name, held):
            yield name, tensor
    for name, each in held.items():
        yield f"{name}.weight", each.parts[0]


def quantization(model: nn.Module, merged: Replaced) -> str | None:
    """What users call the way in which the base's weights are packed, such as "nf4"; None where none is."""
    return ", ".join(sorted({each.packing.label for each in base_packed(model, merged).values()})) or None


def is_adapters(name: str) -> bool:
    """Whether a parameter or module belongs to the adapters."""
    return name == BANK or name.startswith(f"{BANK}.")


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or those that one of a quantization library's is made of: what it stands for is not stored."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            yield f"{name}.{inner}", getattr(tensor, inner)
    else:
        yield name, tensor


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{each}.") for each in modules)
