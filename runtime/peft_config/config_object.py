"""PEFT's configurations as objects: of its own classes where it is installed, else of one with the same fields."""

from collections.abc import Mapping
from typing import Any

from peftc.passes.foreign import peft_classes as contract


class AdapterConfig:
    """What adapter_config.json says, by attribute: the fields of PEFT's class for the method."""

    def __init__(self, fields: Mapping[str, Any]):
        vars(self).update(fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return dict(vars(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterConfig) and vars(other) == vars(self)

    def __repr__(self) -> str:
        return f"AdapterConfig({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def config_object(fields: Mapping[str, Any]) -> Any:
    """The fields of an adapter_config.json as an object that code written for PEFT can read."""
    kind = contract.config_class(str(fields.get("peft_type")))
    if kind is None:
        return AdapterConfig(fields)
    known = contract.config_fields(kind)
    return kind(**{name: value for name, value in fields.items() if name in known})
