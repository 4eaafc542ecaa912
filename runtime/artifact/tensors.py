"""Tensors of a safetensors file, read with torch alone."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.runtime.tensor_file import TYPES

_TYPES = {name: dtype for dtype, name in TYPES.items()}
_HEAD = 8  # bytes that say how long the header is


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. They are mapped, so that only what is used is read; writing changes no file.

    Raises:
        CheckpointError: it cannot be read, or is no safetensors file (E616).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEAD), "little")
            text = file.read(min(length, size))
        header: Any = json.loads(text)
        raw: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        content = torch.empty(0, dtype=torch.uint8).set_(raw)[_HEAD + length :]
        return {name: _tensor(facts, content) for name, facts in header.items() if name != "__metadata__"}
    except OSError as error:
        fail(CheckpointError, "E616", f"cannot read: {error.strerror or error}", where=str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        fail(CheckpointError, "E616", "this is not a safetensors file, or it is damaged", where=str(path))


def _tensor(facts: Any, content: Tensor) -> Tensor:
    dtype, shape = _TYPES[facts["dtype"]], [int(each) for each in facts["shape"]]
    start, end = facts["data_offsets"]
    if not 0 <= start <= end <= len(content) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor is not where the header says")
    part = content[start:end]
    if part.storage_offset() % dtype.itemsize:  # some writers align nothing
        part = part.clone()
    return part.view(dtype).view(shape)
