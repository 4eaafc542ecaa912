"""Writes safetensors files one tensor at a time: what is computed while writing is never there as a whole."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# The names of https://huggingface.co/docs/safetensors, for every type of torch that has one.
TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
ALIGNMENT = 8  # bytes: readers map the tensors where they lie


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what it is called, what it will be, and how it is made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Callable[[], torch.Tensor]

    @classmethod
    def like(cls, name: str, tensor: torch.Tensor, value: Callable[[], torch.Tensor]) -> "Entry":
        """A tensor of the type and shape of another."""
        return cls(name, tensor.dtype, tuple(tensor.shape), value)

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_file(name: str, dtype: torch.dtype) -> tuple[int, str]:
    """By what tensors are sorted in a file."""
    return -dtype.itemsize, name


def write_tensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file, the widest types first, and have it on the disk.

    Raises OSError where the file cannot be written.
    """
    ordered = sorted(entries, key=lambda each: in_file(each.name, each.dtype))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for each in ordered:
        where = [place, place + each.size]
        header[each.name] = {"dtype": TYPES[each.dtype], "shape": list(each.shape), "data_offsets": where}
        place += each.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in ordered:
            value = each.value().detach()
            assert value.dtype == each.dtype, each.name
            assert tuple(value.shape) == each.shape, each.name
            if value.numel():
                file.write(value.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
