"""Which layers of a model are repeated: members of one list that compute alike."""

from collections import Counter
from collections.abc import Hashable

from torch import nn

from peftc.runtime.regions.kinds import fingerprint, hooked_everywhere


def repeated_layers(model: nn.Module) -> dict[str, Hashable]:
    """The members of lists of modules that have others alike in their list, by path, with what each is told apart by.

    Modules without children are no layers: an operator or two is traced as fast as it is stamped.
    """
    if hooked_everywhere():  # every module has to be called
        return {}
    found: dict[str, Hashable] = {}
    for path, each in model.named_modules():
        if not isinstance(each, nn.ModuleList | nn.Sequential):
            continue
        layers = {name: layer for name, layer in each.named_children() if layer._modules}
        if len(layers) < 2:
            continue
        kinds = {name: _kind(layer) for name, layer in layers.items()}
        count = Counter(kinds.values())
        found |= {f"{path}.{name}".lstrip("."): kind for name, kind in kinds.items() if count[kind] > 1}
    return found


def _kind(layer: nn.Module) -> Hashable:
    """What alike layers have in common: also which of a layer's own tensors are one."""
    first: dict[int, int] = {}
    named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    ties = tuple(first.setdefault(id(tensor), at) for at, (_, tensor) in enumerate(named))
    return fingerprint(layer), ties
