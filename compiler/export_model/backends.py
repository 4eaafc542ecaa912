"""The forms in which a program is written: torch.export's own, machine code by AOTInductor, ONNX."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from peftc.compiler.export_model.export_options import ExportFormat
from peftc.compiler.export_model.machine_code import check_compiler, save_machine_code
from peftc.compiler.export_model.noise import quiet
from peftc.compiler.export_model.onnx_file import check_onnx, save_onnx
from peftc.compiler.export_model.programs import BuiltProgram
from peftc.compiler.export_model.sink import sink
from peftc.runtime.artifact.machine import this_machine

LAYOUT = "export.json"
_SUFFIXES: Mapping[str, str] = {"pt2": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}


def file_name(stem: str, backend: ExportFormat) -> str:
    """The name of a program's file."""
    return stem + _SUFFIXES[backend]


def check_installed(backend: ExportFormat) -> None:
    """Raise UsageError where what a backend needs is not installed."""
    if backend == "aoti":
        check_compiler()
    elif backend == "onnx":
        check_onnx()


def machine(backend: ExportFormat) -> dict[str, str] | None:
    """What machine code was made for; None where there is none."""
    return this_machine() if backend == "aoti" else None


def save(made: BuiltProgram, directory: Path, backend: ExportFormat) -> None:
    """Write a program into a directory. Of a program that was written, nothing else can be made.

    Raises ModelError where the program has no such form.
    """
    path = directory / file_name(made.entered.file, backend)
    if backend == "onnx":
        save_onnx(made, path)
        return
    _set_apart(made.program)
    if backend == "aoti":
        save_machine_code(made.program, path)
    else:
        _save_pt2(made.program, path)


def _save_pt2(program: ExportedProgram, path: Path) -> None:
    program._example_inputs = None  # it would be pickled
    with sink(path) as file, quiet():
        torch.export.save(program, file)


def _set_apart(program: ExportedProgram) -> None:
    """Give every tensor a storage of its own. Of a view, the whole that it is a view of would be written."""
    for name, value in program.state_dict.items():
        if value.untyped_storage().nbytes() > value.numel() * value.element_size():
            program.state_dict[name] = _apart(value)


def _apart(value: torch.Tensor) -> torch.Tensor:
    made = _over_the_same(value) if value.is_contiguous() and value.device.type == "cpu" else value.detach().clone()
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(value, torch.nn.Parameter) else made


def _over_the_same(value: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory whose storage ends where it does: a file that is mapped stays mapped."""
    flat = value.detach().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(flat).view(value.dtype).view(value.shape)


def write_layout(directory: Path, programs: Sequence[BuiltProgram], backend: ExportFormat, architecture: str) -> None:
    """What transformers' `ExportedModel.from_pretrained` reads beside the files."""
    components: dict[str, Any] = {}
    for made in programs:
        spec = made.program.call_spec
        metadata = {
            "architecture": architecture,
            "kwargs": {
                each["name"]: {"rank": len(each["shape"]), "shape": each["shape"], "dtype": each["dtype"]}
                for each in made.inputs
                if "shape" in each
            },
            "in_spec": pytree.treespec_dumps(spec.in_spec),
            "out_spec": pytree.treespec_dumps(spec.out_spec),
        }
        for name in made.entered.names:
            component = {"file": file_name(made.entered.file, backend), "metadata": metadata}
            components["model" if name == "forward" else name] = component
    format = "dynamo" if backend == "pt2" else backend
    layout = {"schema_version": 1, "export_format": format, "components": components}
    (directory / LAYOUT).write_text(json.dumps(layout, indent=2) + "\n", encoding="utf-8")
