"""A fake twin: the model's structure over tensors without data, for the exporter to do with as it likes."""

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.grammar.diagnostics import ModelError, fail


class Twin:
    """A copy of a model whose parameters and buffers are FakeTensors on the model's own devices.

    Tracing it needs no memory and no kernels and leaves no trace on the user's model. Tied tensors stay tied. The
    config object is shared, so what a user sets on it is seen by later traces.
    """

    def __init__(self, model: nn.Module):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, object] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            fake = self.mode.from_tensor(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        config = getattr(model, "config", None)
        if config is not None:
            memo[id(config)] = config
        try:
            self.model = copy.deepcopy(model, memo)
        except (TypeError, RuntimeError) as error:
            fail(
                ModelError,
                "E401",
                f"{type(model).__name__} cannot be copied: {error}",
                help="a module holds something deepcopy refuses (a lock, a file, a tensor with a history)",
            )
        for module in self.model.modules():  # what a graph keeps is decided when it runs
            if getattr(module, "gradient_checkpointing", False) is True:
                module.gradient_checkpointing = False  # type: ignore[assignment]

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like this one."""
        return self.mode.from_tensor(tensor)
