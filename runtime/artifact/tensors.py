"""Tensors of a safetensors file, read with torch alone."""

from pathlib import Path

from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.runtime.files.mapped_file import DamagedFileError, map_tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. They are mapped, so that only what is used is read; writing changes no file.

    Raises:
        CheckpointError: it cannot be read, or is no safetensors file (E616).
    """
    try:
        return map_tensors(path)
    except OSError as error:
        fail(CheckpointError, "E616", f"cannot read: {error.strerror or error}", where=str(path))
    except DamagedFileError:
        fail(CheckpointError, "E616", "this is not a safetensors file, or it is damaged", where=str(path))
