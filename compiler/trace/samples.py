"""Sample sizes for tracing: which axes of an input vary, and sizes that tell them apart.

No size is 0 or 1 (torch.export takes those for constants), and the sizes of different meaning differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROWS, QUERY, PAST, SOURCE = 3, 5, 7, 6

ENCODER_INPUTS = ("input_ids", "attention_mask", "inputs_embeds", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Sample:
    """The shape to trace an input with, and the axes that are dynamic."""

    shape: tuple[int, ...]
    dynamic: tuple[int, ...]


@dataclass(frozen=True)
class Sampler:
    """Knows the meaning of a transformers model's inputs by their names.

    `past` is how many tokens the cache of the sample call holds; `rows` is the batch size of the real call.
    """

    is_encoder_decoder: bool
    past: int
    rows: int

    def sample(self, name: str, tensor: torch.Tensor) -> Sample:
        """How to trace one input, given what the real call passed. `name` is the path of the tensor in the call."""
        root, _, rest = name.partition(".")
        shape = list(tensor.shape)
        if not shape:
            return Sample((), ())
        source = self.is_encoder_decoder and (root in ENCODER_INPUTS or root.startswith("encoder_"))
        length = SOURCE if source else QUERY
        if len(shape) == 1:
            size = QUERY if root == "cache_position" else ROWS
            return Sample((size,), (0,))
        axes = self._axes(root, rest, tensor, length)
        if tensor.shape[0] == 1 and self.rows > 1:
            axes.pop(0, None)  # one row that broadcasts over the batch
        for axis, size in axes.items():
            shape[axis] = size
        return Sample(tuple(shape), tuple(axes))

    def _axes(self, root: str, rest: str, tensor: torch.Tensor, length: int) -> dict[int, int]:
        floating = tensor.is_floating_point()
        if root.endswith("attention_mask"):
            seen = length if length == SOURCE else length + self.past
            return {0: ROWS, 1: seen} if tensor.dim() == 2 else {0: ROWS, 2: length, 3: seen}
        if root.endswith("position_ids") and tensor.dim() == 3:
            return {1: ROWS, 2: length}
        if root.endswith(("_ids", "inputs_embeds")) or root.startswith("encoder_"):
            return {0: ROWS, 1: length}
        if root == "labels" and tensor.dim() == 2 and not floating:
            return {0: ROWS, 1: QUERY}
        if root == "input_values":
            return {0: ROWS, 1: max(tensor.shape[1], 2)}
        return {0: ROWS}


def plain_sample(tensors: Sequence[torch.Tensor]) -> tuple[Sample, ...]:
    """Samples for a module nothing is known of: the call's own shapes, every axis free to vary.

    Where every input has one row, a batch of one, the sample gets more, so that the batch stays dynamic.
    """
    single = all(tensor.dim() and tensor.shape[0] == 1 for tensor in tensors)
    samples = []
    for tensor in tensors:
        shape = (ROWS, *tensor.shape[1:]) if single else tuple(tensor.shape)
        samples.append(Sample(shape, tuple(axis for axis, size in enumerate(shape) if size > 1)))
    return tuple(samples)
