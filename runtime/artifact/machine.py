"""What machine code was made for: told by who compiles, checked by who runs."""

import platform
from collections.abc import Mapping

import torch

from peftc.grammar.diagnostics import CheckpointError, fail

_INSTRUCTIONS = ("DEFAULT", "AVX2", "AVX512")  # each runs what was made for those before it


def this_machine() -> dict[str, str]:
    """The system, its processor and the torch that machine code made here needs."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def check_machine(made_for: Mapping[str, str], *, where: str) -> None:
    """Refuse machine code that was made for another machine or another torch.

    Raises:
        CheckpointError: it cannot run here (E608).
    """
    here = this_machine()
    for name, wanted in made_for.items():
        found = here.get(name, wanted)
        if found == wanted or (name == "instructions" and _serves(found, wanted)):
            continue
        message = f"the programs are machine code for another machine: {name} {wanted}, here {found}"
        fail(CheckpointError, "E608", message, help="export the model on this machine", where=where)


def _serves(found: str, wanted: str) -> bool:
    known = found in _INSTRUCTIONS and wanted in _INSTRUCTIONS
    return known and _INSTRUCTIONS.index(found) >= _INSTRUCTIONS.index(wanted)
