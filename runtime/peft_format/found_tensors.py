"""What lies in a file, by the keys that an adapter's plan expects of it, and without what is of no use to a model."""

from collections.abc import Callable, Collection, Container, Mapping

from torch import Tensor

from peftc.passes.plan.plan import AdapterPlan
from peftc.runtime.peft_format.checkpoint import base_name, entries, prefixed
from peftc.runtime.peft_format.key_spelling import Spelling, spelling


def spelled(
    plan: AdapterPlan, tensors: Mapping[str, Tensor], modules: Collection[str]
) -> tuple[dict[str, Tensor], Spelling]:
    """A file's tensors by the keys that are expected of it, and how it spells these. `modules` are the model's."""
    expected = {key: entry.tail for key, entry in entries(plan).items()}
    found = spelling(tensors.keys(), expected, modules, plan.spec.rule.unread)
    return found.applied(tensors), found


def without_idle(
    plan: AdapterPlan, tensors: Mapping[str, Tensor], base: Container[str], is_idle: Callable[[str], bool]
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors without those that neither the plan nor the base's state has and no output depends on; and the
    keys of these.
    """
    expected = entries(plan)
    tails = tuple(f".{each}" for each in {entry.tail for entry in expected.values()} if each)
    left = [key for key in tensors if key not in expected and prefixed(key) not in expected]
    left = [key for key in left if not key.endswith(tails) and base_name(key) not in base]
    idle = [key for key in left if is_idle(base_name(key))]
    return {key: value for key, value in tensors.items() if key not in idle}, idle
