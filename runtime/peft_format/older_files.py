"""What files of older PEFTs do not say or do not hold: heads that their task trains, biases that were never saved."""

from collections.abc import Collection
from dataclasses import replace

from peftc.grammar.spec.spec import AdapterSpec
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan
from peftc.runtime.peft_format.checkpoint import entries
from peftc.runtime.peft_format.key_spelling import PREFIX, SHARED
from peftc.runtime.peft_format.peft_names import ending_selector
from peftc.runtime.peft_format.wrapped_names import BASE


def with_heads(spec: AdapterSpec, task_type: str | None, keys: Collection[str]) -> tuple[AdapterSpec, str]:
    """The spec for a file with these keys: it trains the heads that PEFT trains for the task, whatever the config says.

    Heads that the file does not hold are left to the base; then the second is what to tell of it.
    """
    heads = [each for each in fields.TASK_HEADS.get(task_type or "", ()) if ending_selector(each) not in spec.train]
    if not heads or spec.rule.rows:
        return spec, ""
    saved = tuple(f".{each}" for param in spec.rule.params for _, each in param.saved)
    between = (f"{BASE}.", *(f".{each}." for each in (spec.rule.copies,) if each))
    others = {key for key in keys if any(map(key.__contains__, between)) or key.endswith(saved)}
    found = {head for key in keys if key not in others for head in heads if _is_inside(key, head)}
    if found:
        train = (*spec.train, *(ending_selector(each) for each in heads if each in found))
        return replace(spec, train=train), ""
    if len(heads) < len(fields.TASK_HEADS[task_type or ""]):
        return spec, ""
    return spec, f"the task is {task_type}, and the file has no head of its own: the model keeps the one it has"


def lost_biases(plan: AdapterPlan, keys: Collection[str]) -> frozenset[str]:
    """The keys of biases that a file may lack: releases from 0.6 on saved none of adapted modules, though they say so.

    None may be missing where the file has some of them.
    """
    if plan.spec.bias != "adapter":
        return frozenset()
    biases = {(copy.module, name) for copy in plan.copies if copy.is_bias for name, _, _ in copy.tensors}
    known = {key for key, entry in entries(plan).items() if (entry.key.site, entry.key.role) in biases}
    plain = {key.replace(BASE, "") for key in known}
    held = {PREFIX + key.removeprefix(PREFIX) for key in keys}
    return frozenset() if held & (known | plain) else frozenset(known)


def _is_inside(key: str, ending: str) -> bool:
    """Whether a key is of a tensor in a module whose name ends so."""
    parts = key.removeprefix(PREFIX).removeprefix(SHARED).split(".")[:-1]
    return any(each.endswith(ending) for each in parts)
