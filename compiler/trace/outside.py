"""What no graph can do again, and who did it: a model's own code, or torch itself, which does it all the time."""

from typing import Any


class UntraceableError(Exception):
    """A forward does what no graph can do again. Says what."""


def from_outside(frame: Any) -> bool:
    """Whether the code of this frame is a model's own, and neither torch's nor ours."""
    name = frame.f_globals.get("__name__", "")
    if name == "torch.utils._contextlib":  # a decorated function's
        function = frame.f_locals.get("func")
        name = getattr(function, "__module__", "") or ""
    return name.partition(".")[0] not in ("torch", "peftc")
