"""What users say an adapter is (a spec in any form, a PEFT config), as the spec of that one adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec, Base, Spec
from peftc.runtime.peft_format.peft_config import read_config


@dataclass(frozen=True)
class OneAdapter:
    """An adapter, the weight it is to be active with, and what is demanded of the model it is for."""

    spec: AdapterSpec
    weight: float = 1.0
    base: Base | None = None


def one_adapter(config: Any, name: str | None) -> OneAdapter:
    """The one adapter a config or spec describes, under the name asked for."""
    weights, base = dict[str, float](), None
    if isinstance(config, AdapterSpec):
        found = config
    elif isinstance(config, Mapping) or hasattr(config, "to_dict"):
        fields = config if isinstance(config, Mapping) else config.to_dict()
        # peft holds lists of names as sets, in no order.
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
        facts = read_config(fields, methods=builtin_methods(), adapter_name=name or "default", where="the PEFT config")
        found = facts.spec
    else:
        spec = config if isinstance(config, Spec) else read_spec(_text_or_path(config))
        if len(spec.adapters) != 1 and name is None:
            names = ", ".join(each.name for each in spec.adapters) or "none"
            fail(UsageError, "E518", f"the spec has not one adapter but {names}", help="name one with adapter_name")
        matching = [each for each in spec.adapters if len(spec.adapters) == 1 or each.name == name]
        if not matching:
            fail(UsageError, "E518", f"the spec has no adapter {name!r}")
        found, weights, base = matching[0], dict(spec.active), spec.base
    weight = weights.get(found.name, 1.0)
    return OneAdapter(found if name is None or found.name == name else replace(found, name=name), weight, base)


def _text_or_path(config: Any) -> str | PathLike[str]:
    if isinstance(config, str | PathLike):
        return config
    fail(
        UsageError,
        "E519",
        f"a value of type {type(config).__name__} does not describe an adapter",
        help="pass a spec (a path, its text, a Spec) or a PEFT config",
    )
