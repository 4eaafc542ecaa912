"""One spelling for the keys of a file, whatever wrapped the model that they were read from."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from peftc.passes.foreign.checkpoints import WRAPPERS

PREFIX = "base_model.model."
SHARED = "base_model."  # in front of what the sites of an adapter share

_PREFIX = ("base_model", "model")
_COPIES = "modules_to_save"
_LEAF = "weight"

V = TypeVar("V")


@dataclass(frozen=True)
class Spelling:
    """The plain spelling of each key of a file that is spelled in another way."""

    names: Mapping[str, str] = field(default_factory=dict)

    def applied(self, tensors: Mapping[str, V]) -> dict[str, V]:
        """What a file has, by plain keys. Of two spellings of one the second keeps its key."""
        found: dict[str, V] = {}
        for key, value in tensors.items():
            name = self.names.get(key, key)
            found[key if name in found or (name != key and name in tensors) else name] = value
        return found

    def told(self, name: str) -> str:
        """The file's key for a plain one."""
        return next((key for key, plain in self.names.items() if plain == name), name)


AS_IT_IS = Spelling()
"""Of a file with every key as it is expected."""


def spelling(
    keys: Collection[str], expected: Mapping[str, str], modules: Collection[str], unread: Iterable[str] = ()
) -> Spelling:
    """How the keys of a file are to be understood: a function of them, of what is expected, and of the model's names.

    Wrappers' names are left out anywhere, and so are PEFT's prefixes, however many there are; but not where the model
    has a module that is called so. An adapter's name is left out behind the name of its tensor. A key that is expected
    as it stands stays what it is.

    Args:
        keys: Of the file.
        expected: The keys that the adapter has, each with what the method calls the tensor: `lora_A.weight`. Empty for
            a tensor that a module has by itself.
        modules: The names of the model's modules.
        unread: What the method calls tensors that it leaves unread.
    """
    own = {_unprefixed(key): key for key in reversed(list(expected))}
    tails = {tuple(tail.split(".")) for tail in (*expected.values(), *unread) if tail}
    names: dict[str, str] = {}
    copies: dict[str, str] = {}
    for key in keys:
        if key in expected:
            continue
        read = [_bare(parts, modules) for parts in _readings(key.split("."))]
        nameless = [[".".join(each) for each in _nameless(parts, tails)] for parts in read]
        found = next((own[name] for each in nameless for name in each if name in own), None)
        copied = (".".join(_uncopied(parts)) for parts in read)
        if found is None and (copy := next((name for name in copied if name in own), None)):
            copies[key] = own[copy]
        plain = PREFIX + nameless[0][-1] if found is None else found
        if plain != key:
            names[key] = plain
    # The copy of a trained module under the name PEFT has for it inside, where it is not also there without.
    there = {*(key for key in keys if key in expected), *names.values()}
    return Spelling(names | {key: name for key, name in copies.items() if name not in there})


def _unprefixed(key: str) -> str:
    return key.removeprefix(PREFIX) if key.startswith(PREFIX) else key.removeprefix(SHARED)


def _readings(parts: list[str]) -> Iterator[list[str]]:
    """Behind PEFT's prefix, if at most wrappers stand before it; and as it is, for a model with such modules."""
    at = next((at for at, part in enumerate(parts) if part not in WRAPPERS), 0)
    if tuple(parts[at : at + 2]) == _PREFIX and len(parts) > at + 2:
        yield parts[at + 2 :]
    yield parts


def _bare(parts: list[str], modules: Collection[str]) -> list[str]:
    """Without what wraps the model or a module in it, from the outside in."""
    kept: list[str] = []
    rest = parts
    while len(rest) > 1:
        if ".".join((*kept, rest[0])) in modules:  # the model's own, whatever it is called
            taken = 0
        elif tuple(rest[:2]) == _PREFIX and len(rest) > 2:
            taken = 2
        else:
            taken = int(rest[0] in WRAPPERS or (not kept and rest[0] == _PREFIX[0]))
        kept, rest = kept + (rest[:1] if not taken else []), rest[taken or 1 :]
    return kept + rest


def _nameless(parts: list[str], tails: Iterable[tuple[str, ...]]) -> Iterator[list[str]]:
    """The key as it is, and without the name of an adapter that stands in what a method calls a tensor, or behind it.

    What is saved as a bare parameter may have been a module's `weight`.
    """
    yield parts
    for tail in tails:
        owner, end = parts[: -len(tail) - 1], tuple(parts[-len(tail) - 1 :])
        if any(end[:at] + end[at + 1 :] == tail for at in range(1, len(end))):
            yield [*owner, *tail]
        if len(tail) == 1 and parts[-3:-2] == [*tail] and parts[-1] == _LEAF:
            yield parts[:-2]


def _uncopied(parts: list[str]) -> list[str]:
    """Without PEFT's name for trained copies, and the adapter's name behind it."""
    if _COPIES not in parts[:-2]:
        return parts
    at = parts.index(_COPIES)
    return [*parts[:at], *parts[at + 2 :]]
