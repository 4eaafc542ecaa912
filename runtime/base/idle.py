"""Tensors that a file may hold and no output of a model depends on: buffers it computes anew, heads of trainers."""

import re
from collections.abc import Callable
from functools import cache

from torch import nn

from peftc.passes.foreign.checkpoints import BUFFERS, HEADS, unread_keys


def idle_names(model: nn.Module) -> Callable[[str], bool]:
    """Whether a tensor of this name, which the model's state has not, is one that it does without.

    So is a buffer that the model does not save, wherever in it earlier releases had one of that name in an owner of
    that name; what transformers leaves out of files of this model; and the head that a trainer put beside a model
    which has none. The model is looked at when the first name is asked for.
    """

    @cache
    def facts() -> tuple[set[str], set[str], set[str], tuple[re.Pattern[str], ...]]:
        saved = set(model.state_dict(keep_vars=True))
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False) if name not in saved}
        ends = {_end(each) for each in (*buffers, *BUFFERS)}
        return buffers, ends, {each for each in HEADS if not hasattr(model, each)}, unread_keys(model.modules())

    def is_idle(name: str) -> bool:
        buffers, ends, heads, unread = facts()
        return (
            name in buffers
            or ("." in name and _end(name) in ends)
            or name.partition(".")[0] in heads
            or any(each.search(name) for each in unread)
        )

    return is_idle


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])
