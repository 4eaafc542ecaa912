"""How much of each adapter every token of a call is given."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.insert.gate import with_tokens


@dataclass(frozen=True)
class Given:
    """What a call was given: how many rows and tokens it has, and by a gate's name the numbers of these."""

    rows: int
    tokens: int
    values: Mapping[str, torch.Tensor]


@dataclass(eq=False)
class Gates:
    """The numbers that graphs read: `values` has them by name, `[rows, tokens, 1]` or one a row, `[rows, 1, 1]`."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    now: Given | None = None
    made_for: Any = None  # what says what calls are given

    @contextmanager
    def having(self, given: Given | None) -> Iterator[None]:
        """Inside, graphs read these."""
        before = self.now
        self._give(given)
        try:
            yield
        finally:
            self._give(before)

    def _give(self, given: Given | None) -> None:
        self.now = given
        self.values.clear()
        if given is not None:
            self.values.update(given.values)

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise UsageError unless these are for the tokens that have numbers: `[rows, tokens, ..]`, or ids of them."""
        if self.now is None:
            message = "how much of the adapters a token is given is known in calls of the whole model only"
            fail(UsageError, "E535", message, help="call the model itself, or let the adapters rest: disable_adapter()")
        place = with_tokens(tensors)
        found = None if place is None else tensors[place]
        if found is None or tuple(found.shape[:2]) != (self.now.rows, self.now.tokens):
            sizes = "no tokens" if found is None else f"the sizes {list(found.shape)}"
            message = f"a module with adapters is called with {sizes}"
            message += f", where a route has weighed {self.now.rows} x {self.now.tokens} tokens"
            fail(UsageError, "E535", message, help="choose sites that see every token of the call")
