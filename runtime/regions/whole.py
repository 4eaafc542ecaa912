"""What one graph of the whole model takes for granted: everything inside of the model is as it was."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from peftc.passes.foreign import transformers as contract
from peftc.runtime.base.overlay import BANK
from peftc.runtime.regions.kinds import GLOBAL_HOOKS, HOOKS, OWN
from peftc.runtime.regions.watch import Holds, Read, Watcher

_RECOMPUTING = (contract.CHECKPOINTING, f"_{contract.CHECKPOINTING}_func")  # graphs are recomputed in another way


def watch_whole(model: nn.Module) -> Holds:
    """A function that tells whether everything in an adapted model but its adapters is as it is now.

    Nobody knows which attributes a graph of the whole depends on, so it looks at all. Whether modules train is compared
    with whether the model does, for which there are two graphs. A layer takes it a few microseconds.
    """
    watcher = Watcher()
    inside = dict(_inside(model))
    root = watcher.name(vars(model))
    hooks = [vars(each)[kind] for path, each in inside.items() if path for kind in HOOKS]
    watcher.terms.append(f"not any({watcher.name((*(each for each in hooks if not each), *GLOBAL_HOOKS))})")
    watcher.terms += [f"len({watcher.name(each)}) == {len(each)}" for each in hooks if each]
    for path, each in inside.items():
        own = watcher.name(vars(each))
        if path:
            alike = each.training is model.training
            watcher.terms.append(f"({own}['training'] is {root}['training']) is {alike}")
            watcher.terms.append(f"len({own}) == {len(vars(each))}")  # a forward of its own, or another method hidden
        watcher.tensors(each)
        watcher.children(own, each, but=BANK if each is model else "")
    for read in _reads(inside):
        watcher.read(inside[read.path], read)
    return watcher.made()


def _inside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, each in model.named_modules():
        if path != BANK and not path.startswith(f"{BANK}."):
            yield path, each


def _reads(inside: dict[str, nn.Module]) -> Iterator[Read]:
    known: set[int] = set()
    for path, each in inside.items():
        for name, value in vars(each).items():
            if isinstance(value, PreTrainedConfig):
                yield from _fields(path, name, value, known)
            elif not _is_left_out(path, name):
                yield Read(path, name)


def _fields(path: str, name: str, config: Any, known: set[int]) -> Iterator[Read]:
    if id(config) in known:
        return
    known.add(id(config))
    for field, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _fields(path, f"{name}.{field}", value, known)
        elif field not in contract.FLAGS and not field.startswith("__"):
            yield Read(path, field, config=name)


def _is_left_out(path: str, name: str) -> bool:
    if name in OWN or name == "training" or name in _RECOMPUTING or name.startswith("_peftc"):
        return True
    if name in ("in_features", "out_features"):  # of linears, which go by their weights' sizes
        return True
    return not path and name.startswith("_")  # what transformers and torch keep of a call or a compiler
