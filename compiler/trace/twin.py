"""A fake twin: a model's structure over tensors without data, for the exporter to do with as it likes."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plain import make_plain
from peftc.passes.quantized.packed_operators import QUANTIZED_LINEAR
from peftc.passes.quantized.schemes.known import Packed, packed


class Twin:
    """A copy of a model whose parameters and buffers are FakeTensors on the model's own devices.

    Tracing it needs no memory and no kernels and leaves no trace on the user's model. Tied tensors stay tied. The
    config object is shared, so what a user sets on it is seen by later traces. Where a module stores its weight packed
    there is a linear of the logical size: how it is stored is bound later. `known` are objects to have in the place of
    others, by the id of these.
    """

    def __init__(self, model: nn.Module, known: Mapping[int, object] | None = None):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        # Operators are met once or twice in a trace: to remember what one gave takes longer than to ask it again.
        self.mode.cache_enabled = False
        memo: dict[int, object] = dict(known or {})
        for module in model.modules():
            held = packed(module)
            if held is not None:
                memo[id(module)] = self._stand_in(held)
                continue
            for parameter in module.parameters(recurse=False):  # in a call of FSDP's, plain tensors
                if id(parameter) not in memo:
                    memo[id(parameter)] = nn.Parameter(self.fake(parameter.detach()), requires_grad=False)
            for buffer in module.buffers(recurse=False):
                if id(buffer) not in memo:
                    memo[id(buffer)] = self.fake(buffer.detach())
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
        make_plain(self.model)
        for module in self.model.modules():
            for name in module._parameters.keys() & vars(module).keys():  # FSDP sets the same as attributes, in a call
                del vars(module)[name]
            # What a graph keeps is decided when it runs.
            if getattr(module, contract.CHECKPOINTING, False) is True:
                setattr(module, contract.CHECKPOINTING, False)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like this one."""
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        return self.mode.from_tensor(tensor)

    def _stand_in(self, held: Packed) -> nn.Module:
        packing, bias = held.packing, held.module._parameters.get("bias")
        with self.mode:
            weight = torch.empty(
                packing.out_features,
                packing.in_features,
                dtype=packing.dtype,
                device=next(held.module.parameters()).device,
            )
        return StandIn(weight, None if bias is None else self.fake(bias.detach()))


class StandIn(nn.Linear):
    """A linear in the place of a module that stores its weight packed; its input says the type of its output."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """One operator, whatever the types."""
        return QUANTIZED_LINEAR(input, self.weight, self.bias)
