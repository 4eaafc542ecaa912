"""Tensors of a safetensors file, read with torch alone."""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.runtime.files.tensor_file import TYPES

_TYPES = {name: dtype for dtype, name in TYPES.items()}
_HEAD = 8  # bytes that say how long the header is
_METADATA = "__metadata__"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. They are mapped, so that only what is used is read; writing changes no file.

    Raises:
        CheckpointError: it cannot be read, or is no safetensors file (E616).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEAD), "little")
            header: Any = json.loads(file.read(min(length, size)))
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {name: _tensor(facts, content, _HEAD + length) for name, facts in header.items() if name != _METADATA}
    except OSError as error:
        fail(CheckpointError, "E616", f"cannot read: {error.strerror or error}", where=str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        fail(CheckpointError, "E616", "this is not a safetensors file, or it is damaged", where=str(path))


def _tensor(facts: Any, content: mmap.mmap, head: int) -> Tensor:
    """A tensor whose storage is its part of the file and no more."""
    dtype, shape = _TYPES[facts["dtype"]], [int(each) for each in facts["shape"]]
    start, end = (head + each for each in facts["data_offsets"])
    if not head <= start <= end <= len(content) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor is not where the header says")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    part = torch.frombuffer(content, dtype=torch.uint8, count=end - start, offset=start)
    if start % dtype.itemsize:  # some writers align nothing
        part = part.clone()
    return part.view(dtype).view(shape)
