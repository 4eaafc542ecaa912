"""PEFT's configuration classes: its own where it is installed, else classes that take the same fields."""

from enum import StrEnum
from functools import cache
from typing import Any

from peftc.grammar.diagnostics import ArgumentTypeError, did_you_mean, fail
from peftc.grammar.spec.library import builtin_methods
from peftc.passes.foreign import peft as contract
from peftc.passes.foreign import peft_classes as classes
from peftc.passes.foreign import peft_routes as routes
from peftc.peft.refused import reason
from peftc.runtime.peft_config.config_object import AdapterConfig

_UNKNOWN = "its method is none that comes with peftc; one of your own is a file of some lines"


class TaskType(StrEnum):
    """What a model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def named(name: str) -> Any:
    """What PEFT has under a name that this package has not: a configuration class, or why there is none here.

    Raises AttributeError.
    """
    why = reason(name)
    if why:
        raise AttributeError(f"peftc.peft has no {name}: {why}")
    found = classes.config_named(name)
    if found is not None and classes.is_of_unknown_method(found):
        raise AttributeError(f"peftc.peft has no {name}: {_UNKNOWN}")
    if found is None and not classes.is_installed():
        found = {"PeftConfig": AdapterConfig, "PeftType": _types()}.get(name) or _classes().get(name)
    if found is None:
        raise AttributeError(f"module 'peftc.peft' has no attribute {name!r}")
    return found


@cache
def _types() -> Any:
    """The types of adapters, as an enumeration of texts."""
    return StrEnum("PeftType", {kind: kind for kind in classes.CONFIG_NAMES})


@cache
def _classes() -> dict[str, type[AdapterConfig]]:
    """A class for every method of PEFT's that comes with peftc, and for its route, by PEFT's name for it."""
    found: dict[str, set[str]] = {routes.ROUTED_TYPE: {*routes.SETTINGS.values(), routes.EXPERTS}}
    for rule in builtin_methods().values():
        own = {name for each in rule.peft_fields for name in (each.name, each.pattern) if name}
        found.setdefault(rule.peft_type, set()).update(own)
    return {
        classes.CONFIG_NAMES[kind]: _class(kind, own) for kind, own in found.items() if kind in classes.CONFIG_NAMES
    }


def _class(kind: str, own: set[str]) -> type[AdapterConfig]:
    known = own | contract.HANDLED | contract.HARMLESS

    def made(self: AdapterConfig, **fields: Any) -> None:
        for name in fields:
            if name not in known:
                help = did_you_mean(name, known) or f"its fields are {', '.join(sorted(own))}"
                fail(ArgumentTypeError, "E589", f"{type(self).__name__} has no field {name!r}", help=help)
        AdapterConfig.__init__(self, {"peft_type": kind, **fields})

    namespace = {"__init__": made, "__doc__": f"The fields of PEFT's configuration for {kind}."}
    return type(classes.CONFIG_NAMES[kind], (AdapterConfig,), namespace)
