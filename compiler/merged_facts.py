"""What a merged checkpoint was made from, for the manifest beside it."""

from typing import Any

from peftc.runtime.model import AdaptedModel
from peftc.runtime.saving import versions
from peftc.runtime.spec_config import spec_text


def merged_facts(adapted: AdaptedModel) -> dict[str, Any]:
    """The base, the adapters that are merged with their weights and specs, and the versions, as JSON."""
    state = adapted._adapter_state
    plans = state.plans()
    return {
        "versions": versions(),
        "model": {
            "architecture": adapted.base_class.__name__,
            "id": state.facts.base_name,
            "revision": state.facts.base_revision,
            "fingerprint": adapted.base_fingerprint(),
        },
        "merged": {
            name: {"weight": weight, "method": plans[name].spec.rule.name, "spec": spec_text(plans[name].spec)}
            for name, weight in state.merged_active or state.active
        },
    }
