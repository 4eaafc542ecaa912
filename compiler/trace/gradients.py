"""What a forward says about gradients while it is traced: that it keeps none for a while, asks whether any are kept, or
has a backward of its own. The exporter runs it without gradients, and would leave no sign of any of it in the graph.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers.exporters.utils import patch_attributes

from peftc.compiler.trace.outside import UntraceableError, from_outside
from peftc.compiler.trace.own_backward import own_backward

_BEFORE = "_peftc_before"
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


@dataclass
class Gradients:
    """What one forward of a whole model did. Inside of `watched`, what it computes without gradients is detached."""

    enabled: bool = field(default_factory=torch.is_grad_enabled)  # whether the call keeps gradients
    turned: bool | None = None  # what the forward has turned them to by now; None where it did not
    asked: bool = False  # whether what it did depends on the call's keeping gradients
    own: str = ""  # a function with a backward of its own

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the forward runs."""
        with patch_attributes(self._patches()), own_backward(self._noted), _Detaching(self):
            yield

    def _noted(self, name: str) -> None:
        self.own = self.own or name

    def _patches(self) -> list[tuple[Any, str, Callable[[Any], Any]]]:
        def asks(original: Any) -> Any:
            def is_grad_enabled() -> bool:
                if not from_outside(sys._getframe(1)):
                    return bool(original())
                self.asked |= self.turned is None
                return self.enabled if self.turned is None else self.turned

            return is_grad_enabled

        def enters(original: Any) -> Any:
            def enter(block: Any, *args: Any) -> Any:
                if from_outside(sys._getframe(1)):
                    vars(block).setdefault(_BEFORE, self.turned)
                    self.turned = _turns_to(block)
                return original(block, *args)

            return enter

        def leaves(original: Any) -> Any:
            def leave(block: Any, *args: Any) -> Any:
                if _BEFORE in vars(block):
                    self.turned = vars(block).pop(_BEFORE)
                return original(block, *args)

            return leave

        def sets(original: Any) -> Any:
            def init(block: Any, mode: bool) -> None:
                original(block, mode)
                if from_outside(sys._getframe(1)):
                    vars(block)[_BEFORE], self.turned = self.turned, bool(mode)

            return init

        def decorates(original: Any) -> Any:
            def call(block: Any, function: Any) -> Any:
                if _BEFORE in vars(block):
                    self.turned = vars(block).pop(_BEFORE)
                return original(block, function)

            return call

        blocks = (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.set_grad_enabled)
        return [
            (torch, "is_grad_enabled", asks),
            *((block, "__enter__", enters) for block in blocks),
            *((block, "__exit__", leaves) for block in blocks),
            (torch.set_grad_enabled, "__init__", sets),
            (torch.set_grad_enabled, "__call__", decorates),
        ]


class Asked(TorchFunctionMode):
    """Refuses to say whether a tensor requires a gradient: none does while a forward is traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse_asking(func)
        return func(*args, **(kwargs or {}))


def _refuse_asking(func: Any) -> None:
    # The frame, of what calls the mode, is looked at last: dynamo goes through this for branches, and cannot look.
    if func == _REQUIRES_GRAD and from_outside(sys._getframe(2)):
        raise UntraceableError("it asks whether a tensor requires a gradient")


class _Detaching(TorchFunctionMode):
    def __init__(self, gradients: Gradients):
        super().__init__()
        self.gradients = gradients

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse_asking(func)
        output = func(*args, **(kwargs or {}))
        if self.gradients.turned is not False:
            return output
        given = [id(each) for each in pytree.tree_leaves((args, kwargs))]

        def detached(value: torch.Tensor) -> torch.Tensor:
            # What was written in place is what was given.
            return value if id(value) in given or not value.is_floating_point() else value.detach()

        return pytree.tree_map_only(torch.Tensor, detached, output)


def drop_idle(graph: fx.Graph, names: Mapping[str, Any]) -> None:
    """Take out each `detach` of what no gradient could go through: it depends on no parameter and no input of floats.

    `names` are those of parameters.
    """
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (node.op == "get_attr" and node.target in names):
            through = True
        elif node.op == "get_attr":
            through = node.meta.get("val") is None  # the body of an operator, with whatever is in it
        else:
            through = any(each in live for each in node.all_input_nodes)
        if through and (node.meta.get("val") is None or _has_floats(node.meta["val"])):
            live.add(node)
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten.detach.default and node not in live:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _has_floats(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return any(isinstance(each, torch.Tensor) and (each.is_floating_point() or each.is_complex()) for each in leaves)


def _turns_to(block: Any) -> bool:
    if isinstance(block, torch.set_grad_enabled):
        return bool(block.mode)
    if isinstance(block, torch.inference_mode):
        return not block.mode
    return isinstance(block, torch.enable_grad)
