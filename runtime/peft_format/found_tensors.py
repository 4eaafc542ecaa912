"""What lies in a file, by the keys that an adapter's plan expects of it, and without what is of no use to a model."""

from collections.abc import Callable, Collection, Container, Iterable, Mapping

from torch import Tensor

from peftc.grammar.method.rule import MethodRule
from peftc.grammar.spec.select import select
from peftc.grammar.spec.spec import AdapterSpec
from peftc.passes.foreign.checkpoints import WRAPPERS
from peftc.passes.plan.earlier import Earlier, Names, earlier_names
from peftc.passes.plan.resolve import ModelSurvey
from peftc.runtime.peft_format.checkpoint import Entry, prefixed
from peftc.runtime.peft_format.key_spelling import AS_IT_IS, Spelling, spelling
from peftc.runtime.peft_format.wrapped_names import TOKENS, base_name, plain_name


def named_earlier(spec: AdapterSpec, ground: ModelSurvey, keys: Collection[str], names: Names) -> Earlier:
    """What a file calls by names that the model's library no longer has, told by its keys; empty if it is nothing."""
    rule = spec.rule
    if rule.prompt is not None:
        return Earlier()
    tails = _tails(rule)
    today = _weights(keys, tails)
    held = {site.module for site in ground.sites if site.kind != "parameter"}
    # Nearly every file: all that it names is here, under its name.
    if all(each.rpartition(".")[0] in held for each in today):
        return Earlier()
    plain = spelling(keys, {}, ground.universe.modules, tails)
    tensors = _weights([plain.names.get(key, key) for key in keys], tails)
    bare = [site.name for site in ground.sites if site.kind == "parameter"]
    chosen = {
        each.name
        for target in spec.on
        for selector in target.selectors
        for each in (select(selector, target.where, ground.universe) if bare else ())
    }
    return earlier_names(ground, tensors, names, chosen & set(bare))


def modules_of(rule: MethodRule, keys: Iterable[str]) -> tuple[str, ...]:
    """The modules that a method's tensors with these keys are of, with an adapter's name inside or without."""
    starts, found = {tail.partition(".")[0] for tail in _tails(rule)}, dict[str, None]()
    for key in keys:
        parts = [each for each in plain_name(key).split(".") if each not in WRAPPERS or not each.startswith("_")]
        at = next((at for at in reversed(range(len(parts))) if parts[at] in starts), 0)
        if at:
            found[".".join(parts[:at])] = None
    return tuple(found)


def _tails(rule: MethodRule) -> set[str]:
    """What a method calls its tensors, behind the name of a module."""
    saved = {saved for param in rule.params for _, saved in param.saved}
    return saved | {TOKENS, *rule.unread} | {each for each in (rule.copies, rule.rows) if each}


def _weights(keys: Iterable[str], tails: Collection[str]) -> list[str]:
    """What the base calls the tensors that keys are of, or beside which a method's are."""
    ends, found = {f".{each}": len(each) for each in tails}, []
    for key in keys:
        name = plain_name(key)
        size = next((size for end, size in ends.items() if name.endswith(end)), 0)
        found.append(f"{name[:-size]}weight" if size else name)
    return found


def spelled(
    expected: Mapping[str, Entry], tensors: Mapping[str, Tensor], modules: Collection[str], unread: Iterable[str]
) -> tuple[dict[str, Tensor], Spelling]:
    """A file's tensors by the keys that are expected of it, and how it spells these.

    `modules` are the model's; `unread` is what the method calls tensors that it leaves unread.
    """
    if expected.keys() >= tensors.keys():
        return dict(tensors), AS_IT_IS
    found = spelling(tensors.keys(), {key: entry.tail for key, entry in expected.items()}, modules, unread)
    return found.applied(tensors), found


def without_idle(
    expected: Mapping[str, Entry],
    tensors: Mapping[str, Tensor],
    base: Container[str],
    is_idle: Callable[[str], bool],
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors without those that neither are expected nor in the base's state and no output depends on; and
    the keys of these.
    """
    tails = tuple(f".{each}" for each in {entry.tail for entry in expected.values()} if each)
    left = [key for key in tensors if key not in expected and prefixed(key) not in expected]
    left = [key for key in left if not key.endswith(tails) and base_name(key, base) is None]
    idle = [key for key in left if is_idle(plain_name(key))]
    return {key: value for key, value in tensors.items() if key not in idle}, idle
