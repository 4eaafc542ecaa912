"""Modules as the user's classes have them: a region of an adapted model has a class of its own, derived from that."""

from torch import nn

REGION = "_peftc_region"
"""The attribute in which a module has the region that it is."""

REGION_OF = "_region_of"
"""The attribute in which the class of a region has the user's class."""


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module that may be a region."""
    found: type[nn.Module] = getattr(type(module), REGION_OF, type(module))
    return found


def make_plain(model: nn.Module) -> None:
    """Let no module be a region any more: for copies, which are models of the user's."""
    for module in model.modules():
        if vars(module).pop(REGION, None) is not None or REGION_OF in vars(type(module)):
            module.__class__ = plain_class(module)
