"""How modules become regions: by a class derived from their own."""

import inspect
import types
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftc.grammar.spec.spec import Regions
from peftc.passes.plan.plain import REGION, REGION_OF, plain_class
from peftc.passes.plan.structure import Structure
from peftc.passes.quantized.schemes.known import packed_modules
from peftc.runtime.execution.segments import layer_names
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.places import DEFAULT, INSIDE, owners_of, places
from peftc.runtime.regions.region import Region
from peftc.runtime.regions.within import is_within, standing

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_KINDS: dict[type, type] = {}
_MADE = "_peftc_made"


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
        _CLASSES[base] = made = _kind_of(type(base))(base.__name__, (base,), namespace)
        setattr(made, _MADE, True)
    return _CLASSES[base]


def _kind_of(kind: Any) -> Any:
    """A class of classes of regions: what is set on one, once it is made, is set on the class that it derives from.

    So it is where a user says `type(layer).forward = ...`.
    """
    if kind not in _KINDS:

        def write(cls: Any, name: str, value: Any) -> None:
            if _MADE in vars(cls):
                setattr(vars(cls)[REGION_OF], name, value)
            else:  # a class may have a say in how others derive from it
                kind.__setattr__(cls, name, value)

        def delete(cls: Any, name: str) -> None:
            if _MADE in vars(cls):
                delattr(vars(cls)[REGION_OF], name)
            else:
                kind.__delattr__(cls, name)

        _KINDS[kind] = type(kind.__name__, (kind,), {"__setattr__": write, "__delattr__": delete})
    return _KINDS[kind]


def _remade(base: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(region_class(base))
    return made


def become_regions(model: nn.Module, host: Host, structure: Structure, regions: Regions = DEFAULT) -> None:
    """Let the modules that may be regions be such. Those that are stay so."""
    stored = tuple(packed_modules(model))
    found = places(model, owners_of(model, structure), regions)
    _become(model, host, found)
    host.look()
    host.holds_packed(stored, {path for path in found if any(is_within(name, path) for name in stored)})


def layers_become_regions(model: nn.Module, host: Host) -> None:
    """Let every repeated layer be a region, adapted or not: it is computed again in the backward pass."""
    layers = layer_names(model)
    _become(model, host, dict.fromkeys(layers, INSIDE))
    host.look()
    for number, path in enumerate(layers):
        vars(model.get_submodule(path))[REGION].layer = number


def renew_regions(model: nn.Module, host: Host) -> None:
    """Let modules that have been put in the place of regions be such. Those that were moved keep their adapters."""
    _become(model, host, {path: each.why for path, each in host.regions.items()})
    host.look()
    host.enter()


def is_moved(model: nn.Module, host: Host, path: str) -> bool:
    """Whether what had a path when it became a region is elsewhere in the model by now, or gone."""
    module = standing(model, path)
    region = None if module is None else vars(module).get(REGION)
    return module is None or (region is not None and region.host is host and region.path != path)


def _become(model: nn.Module, host: Host, places: Mapping[str, str]) -> None:
    for path, why in places.items():
        module, known = standing(model, path), host.regions.get(path)
        if known is not None:
            known.why = known.why or why
        if not path or module is None or (known is not None and known.module is module):
            continue
        own = vars(module).get(REGION)
        if own is not None and own.host is host:  # it was moved here, with its adapters, or is back
            if own.path == path:
                host.regions[path] = own
                host.told(replaced=True)
            continue
        base = plain_class(module)
        region = Region(host, path, module, types.MethodType(base.forward, module))
        for name, value in list(vars(module).items()):
            own = isinstance(value, types.MethodType) and value.__self__ is module
            if own and value.__func__ is base.forward:  # what a hook of a library calls as the module's own
                vars(module)[name] = types.MethodType(region_class(base).forward, module)
        if REGION_OF not in vars(type(module)):
            module.__class__ = region_class(base)
        region.why = why
        module.__dict__[REGION] = region
        host.told(replaced=path in host.regions)
        host.regions[path] = region
