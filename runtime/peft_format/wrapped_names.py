"""What PEFT calls modules and their own tensors once it has put its wrappers around them."""

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import accumulate

from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.site import WHOLE
from peftc.runtime.peft_format.key_spelling import PREFIX, SHARED

TOKENS = "token_adapter.trainable_tokens_delta"  # trained rows beside what a method of another kind adapts
BASE = ".base_layer"
_TOKEN_ADAPTER = TOKENS.partition(".")[0]


def wrappers_of(plan: AdapterPlan) -> dict[str, list[str]]:
    """The sites that wrap each module, innermost first."""
    wrappers: dict[str, list[str]] = {}
    for planned in plan.sites:
        if planned.site.kind not in WHOLE:
            wrappers.setdefault(planned.site.module, []).append(planned.site.name)
    return wrappers


def wrapped_name(module: str, wrappers: Mapping[str, Sequence[str]], *, itself: bool) -> str:
    """A module's name once PEFT has put its wrappers around the modules above it (and around `itself`)."""
    parts = module.split(".")
    wrapped = [part + BASE * len(wrappers.get(path, ())) for part, path in zip(parts, _paths(parts), strict=True)]
    return ".".join(wrapped if itself else [*wrapped[:-1], parts[-1]])


def _paths(parts: Sequence[str]) -> Iterator[str]:
    """The name of each of the modules that a name leads through."""
    return accumulate(parts, "{}.{}".format)


def base_key(plan: AdapterPlan, name: str) -> str:
    """The key by which PEFT saves a tensor of the base beside the plan's adapter."""
    module, _, leaf = name.rpartition(".")
    path = wrapped_name(module, wrappers_of(plan), itself=True)
    rows = next((each for each in plan.rows if module in each.modules), None)
    if rows is not None:
        path += BASE if rows.saved else f".{_TOKEN_ADAPTER}{BASE}"
    virtual = any(each.site.kind in WHOLE for each in plan.sites)
    return (SHARED if virtual else PREFIX) + f"{path}.{leaf}".lstrip(".")


def base_name(key: str, names: Container[str]) -> str | None:
    """The name in the model of a tensor of the base's own that a file holds under this key; None for any other."""
    plain = _unwrapped(key)
    return next((each for start in (PREFIX, SHARED) if (each := plain.removeprefix(start)) in names), None)


def plain_name(key: str) -> str:
    """What the model would call what a file has under this key, were it the base's own."""
    return _unwrapped(key).removeprefix(PREFIX)


def _unwrapped(key: str) -> str:
    return key.replace(f".{_TOKEN_ADAPTER}{BASE}.", ".").replace(f"{BASE}.", ".")
