"""What lowerings of tensor functions work with: operators called at once or made as nodes, and where values lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from peftc.grammar.algebra.algebra import Option

aten = torch.ops.aten
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Ops(Protocol[T_co]):
    """How to call an operator: at once, or by making a node."""

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> T_co:
        """The result of the operator."""
        ...

    def tensor(self, value: Any) -> torch.Tensor:
        """The tensor, or a fake one like it: for its sizes, type and device."""
        ...


class Eager:
    """Calls operators at once."""

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The result of the operator."""
        return op(*args, **kwargs)

    def tensor(self, value: Any) -> torch.Tensor:
        """The tensor itself."""
        assert isinstance(value, torch.Tensor)
        return value


@dataclass(frozen=True)
class LoweringContext(Generic[T]):
    """What a lowering works with: the operators, how many leading axes values have, and a value to be like.

    Only while `training` is anything drawn. `task` is that of a row, `[1]`, where rows have some.
    """

    ops: Ops[T]
    lead: int
    example: T
    training: bool = False
    task: T | None = None

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> T:
        """The result of an operator."""
        return self.ops.call(op, *args, **kwargs)

    def sizes(self, value: T) -> list[int]:
        """All sizes of a value, the leading ones included."""
        return [int(each) for each in self.ops.tensor(value).shape]

    def own(self, value: T) -> int:
        """How many axes a value has of its own."""
        return self.ops.tensor(value).dim() - self.lead

    def axis(self, value: T, axis: Option) -> int:
        """An own axis, counted from the end."""
        assert isinstance(axis, int)
        return axis - self.own(value)

    def kind(self, value: T) -> dict[str, Any]:
        """The dtype and device of a value, for operators that make one."""
        tensor = self.ops.tensor(value)
        return {"dtype": tensor.dtype, "device": tensor.device}

    def reshape(self, value: T, sizes: Sequence[int]) -> T:
        """The value with other sizes of its own."""
        return self.call(aten.reshape.default, value, [*self.sizes(value)[: self.lead], *sizes])

    def arange(self, size: int) -> T:
        """0, 1, ... size - 1."""
        return self.call(aten.arange.default, size, device=self.ops.tensor(self.example).device)
