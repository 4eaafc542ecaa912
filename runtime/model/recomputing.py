"""Gradient checkpointing, by the names transformers gives it."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.runtime.execution.segments import OPTIONS, Recompute, layer_names
from peftc.runtime.model.state import AdapterState


class Recomputing(nn.Module):
    """The part of an adapted model that trades time for memory."""

    _adapter_state: AdapterState
    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """From now on, keep only what goes into a layer in training, and compute the layer again in the backward pass.

        As transformers' method of that name, and Trainer's `gradient_checkpointing`: losses and gradients stay as they
        are, random numbers included. Each repeated layer of the model (those transformers marks, else the members of
        its ModuleLists) runs under `torch.utils.checkpoint.checkpoint(use_reentrant=False)`; a layer that changes
        buffers as it runs, like a batch norm, is left alone. What a forward returns is kept: pass `use_cache=False`,
        as Trainer does, or the keys and values of every layer are. Without gradients, and in evaluation, nothing
        changes; nor does it under torch.compile, which has a partitioner of its own that decides what to recompute.

        Args:
            gradient_checkpointing_kwargs: `preserve_rng_state`, `context_fn`, `determinism_check`, `debug` and
                `early_stop`, as torch has them. A warning tells that `use_reentrant=True` is not followed.
            every_n_layers: recompute only every so many layers.
            offload: keep what goes into the layers in host memory.

        Raises:
            UsageError: an unknown option (E560), a count that is none (E561), a model without repeated layers (E562).
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            message = "use_reentrant=True is not followed: layers are recomputed the other way, with the same gradients"
            warnings.warn(message, stacklevel=2)
        for name in options:
            if name not in OPTIONS:
                help = did_you_mean(name, sorted(OPTIONS)) or f"known are use_reentrant, {', '.join(sorted(OPTIONS))}"
                fail(UsageError, "E560", f"gradient checkpointing has no option {name!r}", help=help)
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
            message = f"every_n_layers is {every_n_layers!r}"
            fail(UsageError, "E561", message, help="give how many layers share one that is recomputed, 1 for all")
        if not layer_names(self):
            message = f"{type(self).__name__} has no repeated layers to recompute"
            fail(UsageError, "E562", message, help="put its layers into a torch.nn.ModuleList")
        recompute = Recompute(every_n_layers, bool(offload), tuple(sorted(options.items())))
        self._adapter_state.engine.recompute = recompute

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._adapter_state.engine.recompute = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in training."""
        return self._adapter_state.engine.recompute is not None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable`, by transformers' newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable`, by transformers' newer name."""
        self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing`, by transformers' newer name."""
        return self.is_gradient_checkpointing
