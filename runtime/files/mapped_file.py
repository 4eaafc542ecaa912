"""Reads safetensors files with torch alone: tensors are mapped, so that only what is used is read."""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.runtime.files.tensor_file import TYPES

_TYPES = {name: dtype for dtype, name in TYPES.items()}
_HEAD = 8  # bytes that say how long the header is
_METADATA = "__metadata__"


class DamagedFileError(ValueError):
    """The file is no safetensors file, or not the whole of one."""


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. Writing into them changes no file.

    safetensors' own reader maps too, and takes three times as long for the many small tensors of an adapter.

    Raises:
        DamagedFileError: what is read is not what the format says.
        OSError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEAD), "little")
            if length > size - _HEAD:
                raise ValueError("it ends within its header")
            header: Any = json.loads(file.read(length))
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {name: _tensor(facts, content, _HEAD + length) for name, facts in header.items() if name != _METADATA}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise DamagedFileError(str(error)) from error


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
