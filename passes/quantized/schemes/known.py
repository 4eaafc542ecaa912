"""Every scheme there is, and which one a module is of."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.quantized.schemes.bitsandbytes_4bit import FourBit
from peftc.passes.quantized.schemes.bitsandbytes_8bit import EightBit
from peftc.passes.quantized.schemes.hqq import HalfQuadratic
from peftc.passes.quantized.schemes.packing import Packing, Scheme
from peftc.passes.quantized.schemes.torchao import TorchAo

SCHEMES: tuple[Scheme, ...] = (FourBit(), EightBit(), TorchAo(), HalfQuadratic())
_BEFORE: "WeakKeyDictionary[nn.Module, tuple[Scheme, Packing]]" = WeakKeyDictionary()
_PARTS: "WeakKeyDictionary[nn.Module, tuple[torch.Tensor, ...]]" = WeakKeyDictionary()
_BY_NAME = {each.name: each for each in SCHEMES}


def register(scheme: Scheme) -> None:
    """Have peftc know a scheme of your own, from now on and in this process: docs/own-scheme.md.

    It is asked about a module before the schemes that come with peftc. A scheme of the same name that was registered
    before is replaced. Raises UsageError if peftc has one of that name.
    """
    if any(each.name == scheme.name for each in SCHEMES):
        fail(UsageError, "E524", f"peftc has a scheme called {scheme.name!r}", help="give yours another name")
    _BY_NAME[scheme.name] = scheme


def unregister(name: str) -> None:
    """Forget a scheme that was registered. Raises UsageError if there is none of that name."""
    if name not in _BY_NAME or any(each.name == name for each in SCHEMES):
        fail(UsageError, "E524", f"no scheme called {name!r} was registered")
    del _BY_NAME[name]


def known_schemes() -> tuple[Scheme, ...]:
    """Every scheme that is known now, in the order in which they are asked."""
    own = tuple(each for each in _BY_NAME.values() if each not in SCHEMES)
    return (*own, *SCHEMES)


@dataclass(frozen=True)
class Packed:
    """A module that stores its weight packed, and its scheme."""

    module: nn.Module
    scheme: Scheme
    packing: Packing

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors."""
        module = self.module
        if not _is_emptied(module):
            _PARTS[module] = self.scheme.parts(module)
        return _PARTS[module]

    def unpack(self) -> torch.Tensor:
        """The weight, `[out, in]`."""
        return self.scheme.unpack(self.parts, self.packing)


def packed(module: nn.Module) -> Packed | None:
    """What a module stores packed, if it does so in a way known here.

    While torch.export goes through a model it has tensors without data in the place of what is stored, which say
    nothing; then it is what it was before.
    """
    if _is_emptied(module):
        known = _BEFORE.get(module)
        return None if known is None else Packed(module, *known)
    for scheme in known_schemes():
        packing = scheme.packing(module)
        if packing is not None:
            _BEFORE[module] = scheme, packing
            return Packed(module, scheme, packing)
    return None


def _is_emptied(module: nn.Module) -> bool:
    """Whether somebody has put tensors without data in the place of a module's."""
    return any(isinstance(each, FakeTensor) for each in module._parameters.values())


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """Every module of a model that stores its weight packed, by name."""
    found = ((name, packed(module)) for name, module in model.named_modules())
    return {name: each for name, each in found if each is not None}


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model's parameters are; a packed weight is as many as the dense one that it stands for."""
    held = packed_modules(model).values()
    stored = {id(each) for at in held for name, each in at.module.named_parameters(recurse=False) if name != "bias"}
    dense = sum(each.packing.out_features * each.packing.in_features for each in held)
    return dense + sum(each.numel() for each in model.parameters() if id(each) not in stored)


def scheme_of(packing: Packing) -> Scheme:
    """The scheme that a packing is of. Raises UsageError if it is not known in this process."""
    found = _BY_NAME.get(packing.scheme)
    if found is None:
        help = "register it first: peftc.passes.quantized.schemes.known.register(scheme)"
        fail(UsageError, "E524", f"a weight is packed by {packing.scheme!r}, which no scheme here is called", help=help)
    return found
