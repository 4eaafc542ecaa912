"""Sample sizes for tracing: what the axes of an input count, and sizes that tell them apart.

No size is 0 or 1 (torch.export takes those for constants), and the sizes of different meaning differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from peftc.passes.foreign.transformers import Argument
from peftc.passes.ir.inputs import BATCH, PAST, SEQUENCE, SOURCE, CacheSlot, InputSpec, Size, sizes_by
from peftc.passes.ir.roles import Role, Stack
from peftc.runtime.execution import caches

SIZES = {BATCH: 3, SEQUENCE: 5, PAST: 7, SOURCE: 6}

Axes = tuple[Size | None, ...]


@dataclass(frozen=True)
class Sample:
    """The shape to trace an input with, and what each axis counts: None where it varies and nobody knows what for."""

    shape: tuple[int, ...]
    axes: Axes

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The axes that vary."""
        return tuple(axis for axis, size in enumerate(self.axes) if not isinstance(size, int))


@dataclass(frozen=True)
class Sampler:
    """Knows what the axes of a transformers model's inputs count, by their roles.

    `past` says whether the cache of the sample call holds tokens; `rows` is the batch size of the real call.
    """

    past: bool
    rows: int

    def sample(self, argument: Argument, tensor: torch.Tensor) -> Sample:
        """How to trace one input, given what the real call passed."""
        axes: list[Size | None] = [int(size) for size in tensor.shape]
        if len(axes) == 1:
            axes = [(SEQUENCE if argument.role == Role.PLACES else BATCH,)]
        elif axes:
            named = self._axes(argument, tensor)
            if tensor.shape[0] == 1 and self.rows > 1:
                named.pop(0, None)  # one row that broadcasts over the batch
            axes = [named.get(axis, size) for axis, size in enumerate(axes)]
        shape = (
            max(tensor.shape[axis], 2) if size is None else sizes_by(SIZES, size) for axis, size in enumerate(axes)
        )
        return Sample(tuple(shape), tuple(axes))

    def _axes(self, argument: Argument, tensor: torch.Tensor) -> dict[int, Size | None]:
        """The axes of two or more that count something."""
        rows, source = (BATCH,), argument.stack == Stack.ENCODER
        length: Size = (SOURCE,) if source else (SEQUENCE,)
        match argument.role:
            case Role.MASK | Role.OTHER_MASK:
                seen: Size = (PAST, SEQUENCE) if self.past and not source else length
                return {0: rows, 1: seen} if tensor.dim() == 2 else {0: rows, 2: length, 3: seen}
            case Role.POSITIONS if tensor.dim() == 3:
                return {1: rows, 2: length}
            case Role.TOKENS | Role.EMBEDDINGS | Role.POSITIONS | Role.TYPES | Role.IDS | Role.ENCODED:
                return {0: rows, 1: length}
            case Role.LABELS if tensor.dim() == 2 and not tensor.is_floating_point():
                return {0: rows, 1: (SEQUENCE,)}
            case Role.SIGNAL:
                return {0: rows, 1: None}
            case _:
                return {0: rows}


def plain_sample(tensors: Sequence[torch.Tensor]) -> tuple[Sample, ...]:
    """Samples for a module nothing is known of: the call's own shapes, every axis free to vary.

    Where every input has one row, a batch of one, the sample gets more, so that the batch stays dynamic. The first axis
    is the batch where it varies and is of one size in every input.
    """
    single = all(tensor.dim() and tensor.shape[0] == 1 for tensor in tensors)
    rows = {SIZES[BATCH] if single else tensor.shape[0] for tensor in tensors if tensor.dim()}
    is_batch = len(rows) == 1 and rows != {1}
    samples = []
    for tensor in tensors:
        shape = (SIZES[BATCH], *tensor.shape[1:]) if single else tuple(tensor.shape)
        axes: list[Size | None] = [size if size <= 1 else None for size in shape]
        if axes and is_batch and axes[0] is None:
            axes[0] = (BATCH,)
        samples.append(Sample(shape, tuple(axes)))
    return tuple(samples)


def of_one_size(given: Sequence[torch.Tensor], cached: Sequence[torch.Tensor]) -> None:
    """Tell the exporter that what a cache holds is of the call's rows and as long in one layer as in another, so that
    calls of layers are alike from the first on. Samples of another size are of another meaning.
    """
    first: dict[tuple[int, int], torch.SymInt] = {}
    for tensor in given:
        if cached and tensor.dim() and isinstance(tensor.shape[0], torch.SymInt):
            first.setdefault((0, tensor.shape[0].node.hint), tensor.shape[0])
    for tensor in cached:
        for axis in (0, 2):
            size = tensor.shape[axis]
            if isinstance(size, torch.SymInt):
                known = first.setdefault((axis, size.node.hint), size)
                with disable_proxy_modes_tracing():  # it is no part of the graph
                    bool(size == known)


def sample_cache(layout: caches.Layout, device: torch.device) -> Iterator[tuple[InputSpec, torch.Tensor]]:
    """The keys and values that a graph takes, with what they are."""
    cross = layout.cross if layout.filled else ()
    for is_cross, layers, length in ((False, layout.own, PAST), (True, cross, SOURCE)):
        for index, layer in enumerate(layers):
            for part, size in (("key", layer.key_size), ("value", layer.value_size)):
                slot, axes = CacheSlot(index, part, is_cross), ((BATCH,), layer.heads, (length,), size)
                spec = InputSpec(f"past_{slot}", Role.CACHE, _cached_stack(layout), axes, slot)
                shape = tuple(sizes_by(SIZES, each) for each in axes)
                yield spec, torch.zeros(shape, dtype=layer.dtype, device=device)


def _cached_stack(layout: caches.Layout) -> Stack:
    return Stack.DECODER if layout.is_encoder_decoder else Stack.ONLY
