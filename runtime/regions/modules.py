"""Which modules may be regions, and how they become ones: by a class derived from their own."""

import inspect
import types
from collections.abc import Iterable
from typing import Any, Literal, cast, get_args

from torch import nn

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.passes.plan.plain import REGION, REGION_OF, plain_class
from peftc.passes.plan.site import WHOLE
from peftc.passes.plan.structure import Structure
from peftc.passes.quantized.schemes.known import packed_modules
from peftc.runtime.execution.segments import layer_names
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.region import Region
from peftc.runtime.regions.within import is_within

Regions = Literal["model", "layers", "modules"]
"""Where regions begin: at the model, at repeated layers and adapted modules outside of them, or at adapted modules."""

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def region_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of regions of a class: named like it, with its forward's signature."""
    if base not in _CLASSES:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            region = self._peftc_region
            return base.forward(self, *args, **kwargs) if region is None else region.run(args, kwargs)

        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
        forward.__doc__ = base.forward.__doc__

        def reduce(self: Any, protocol: Any) -> Any:
            return (_remade, (base,), self.__dict__)

        namespace = {
            "forward": forward,
            REGION: None,
            "__reduce_ex__": reduce,
            REGION_OF: base,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        }
        _CLASSES[base] = type(base.__name__, (base,), namespace)
    return _CLASSES[base]


def _remade(base: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(region_class(base))
    return made


def checked(regions: object) -> Regions:
    """Where regions are to begin. Raises UsageError for what is no such place."""
    if regions not in get_args(Regions):
        help = did_you_mean(str(regions), get_args(Regions)) or f"it is one of {', '.join(get_args(Regions))}"
        fail(UsageError, "E573", f"regions cannot be {regions!r}", help=help)
    return cast(Regions, regions)


def places(model: nn.Module, owners: Iterable[str], regions: Regions = "layers") -> tuple[str, ...]:
    """The modules that may be regions: these, and what is around them up to a repeated layer."""
    layers = () if regions == "modules" else layer_names(model)
    found: dict[str, None] = {}
    for owner in owners:
        head = next((each for each in layers if is_within(owner, each)), owner)
        name = owner
        while True:
            found[name] = None
            if name == head or not name:
                break
            name = name.rpartition(".")[0]
    return tuple(found)


def needs_whole(structure: Structure) -> bool:
    """Whether what is active puts something in front of a text or cache, or into what the model itself holds."""
    return any(each.site.kind in WHOLE for each in structure.fronts) or any(not at.site.user for at in structure.sites)


def _owners(model: nn.Module, structure: Structure) -> Iterable[str]:
    """The modules in whose forward adapted weights are used."""
    names = [at.site.user for at in structure.sites]
    names += [copy.target.rpartition(".")[0] for copy in structure.copies]
    names += [each.module for each in structure.rows] + [each.site.module for each in structure.at("attention")]
    for name in dict.fromkeys(names):
        # A list of modules or of parameters has no forward: its parent uses what it holds.
        while name and type(model.get_submodule(name)).forward is nn.Module.forward:
            name = name.rpartition(".")[0]
        yield name


def become_regions(model: nn.Module, host: Host, structure: Structure, regions: Regions = "layers") -> None:
    """Let the modules that may be regions be such. Those that are stay so.

    What is stored packed is computed with in the same way wherever it is, adapted or not.
    """
    stored = tuple(packed_modules(model))
    found = places(model, [*_owners(model, structure), *stored], regions)
    _become(model, host, found)
    host.stored |= set(stored)
    host.packed |= {path for path in found if any(is_within(name, path) for name in stored)}


def layers_become_regions(model: nn.Module, host: Host) -> None:
    """Let every repeated layer be a region, adapted or not: it is computed again in the backward pass."""
    layers = layer_names(model)
    _become(model, host, layers)
    for number, path in enumerate(layers):
        host.regions[path].layer = number


def _become(model: nn.Module, host: Host, paths: Iterable[str]) -> None:
    for path in paths:
        if not path or path in host.regions:
            continue
        module = model.get_submodule(path)
        base = plain_class(module)
        region = Region(host, path, module, types.MethodType(base.forward, module))
        for name, value in list(vars(module).items()):
            own = isinstance(value, types.MethodType) and value.__self__ is module
            if own and value.__func__ is base.forward:  # what a hook of a library calls as the module's own
                vars(module)[name] = types.MethodType(region_class(base).forward, module)
        if REGION_OF not in vars(type(module)):
            module.__class__ = region_class(base)
        module.__dict__[REGION] = region
        host.regions[path] = region
