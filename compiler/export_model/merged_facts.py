"""What an exported model was made from, for the manifest beside it."""

from collections.abc import Sequence
from typing import Any

from peftc.runtime.model.model import AdaptedModel
from peftc.runtime.model.saving import versions
from peftc.runtime.peft_config.spec_config import spec_text


def merged_facts(adapted: AdaptedModel) -> dict[str, Any]:
    """The base, the adapters that are merged with their weights and specs, and the versions, as JSON."""
    state = adapted._adapter_state
    active = state.base.merged or state.active
    return {
        **_base_facts(adapted),
        "merged": {name: {"weight": weight, **made_by(adapted, name)} for name, weight in active},
    }


def adapter_facts(adapted: AdaptedModel, names: Sequence[str] | None) -> dict[str, Any]:
    """The same of adapters that are not merged; all, if none is named."""
    found = names or adapted._adapter_state.names()
    return {**_base_facts(adapted), "adapters": {name: made_by(adapted, name) for name in found}}


def _base_facts(adapted: AdaptedModel) -> dict[str, Any]:
    facts = adapted._adapter_state.base.facts
    return {
        "versions": versions(),
        "model": {
            "architecture": adapted.base_class.__name__,
            "id": facts.base_name,
            "revision": facts.base_revision,
            "fingerprint": adapted.base_fingerprint(),
        },
    }


def made_by(adapted: AdaptedModel, name: str) -> dict[str, Any]:
    """An adapter's method and spec."""
    spec = adapted._adapter_state.plans()[name].spec
    return {"method": spec.rule.name, "spec": spec_text(spec)}
