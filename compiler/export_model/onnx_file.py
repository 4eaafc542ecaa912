"""Programs as ONNX models, by torch.onnx."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

from peftc.compiler.export_model.noise import first_error, quiet
from peftc.compiler.export_model.programs import BuiltProgram
from peftc.grammar.diagnostics import ModelError, UsageError, fail

_NEEDED = ("onnx", "onnxscript")
_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def check_onnx() -> None:
    """Raise UsageError where a package is not installed that ONNX models are made with."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        message = f"an ONNX model is made with {' and '.join(missing)}, not installed here"
        fail(UsageError, "E652", message, help="pip install peftc[onnx]")


def save_onnx(made: BuiltProgram, path: Path) -> None:
    """Write a program as an ONNX model: NAME.onnx, and beside it NAME.onnx.data with the weights.

    Its inputs and outputs have the names of the program's. An adapter's tensors have their own, with `adapter.` in
    front. Raises ModelError where an operator has no form in ONNX.
    """
    names = list(_names(made.inputs))
    outputs = [each["name"] for each in made.outputs]
    with quiet():
        try:
            program = torch.onnx.export(
                made.program, dynamo=True, verbose=False, input_names=names, output_names=outputs
            )
        except OSError:
            raise
        except Exception as error:  # torch.onnx wraps what it finds in errors of several kinds
            _refuse(error)
    assert program is not None
    _name_sizes(program.model, _symbols(made))
    program.save(path, external_data=True)


def _names(inputs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in inputs:
        if "tensors" in each:
            yield from (f"{each['name']}.{inner['name']}" for inner in each["tensors"])
        else:
            yield each["name"]


def _refuse(error: BaseException) -> NoReturn:
    # What went wrong is wrapped in what step it was, and in what to tell torch's developers.
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    missing = next((found for each in chain if (found := _MISSING.search(str(each)))), None)
    if missing:
        message = f"{missing[1]} has no form in ONNX"
        help = "adapters='merged' leaves out what most methods compute with; format='pt2' has every operator"
        fail(ModelError, "E653", message, help=help)
    message = f"the program has no form in ONNX: {first_error(chain[-1])}"
    fail(ModelError, "E653", message, help="write format='pt2' instead")


def _symbols(made: BuiltProgram) -> dict[str, str]:
    """Torch's symbols for sizes, with our names for them."""
    symbols = map(str, made.program.range_constraints)
    return dict(zip(symbols, (each.name for each in made.dimensions), strict=True))


def _name_sizes(model: Any, names: Mapping[str, str]) -> None:
    """Call sizes what the manifest calls them, where they have a symbol of torch's."""
    library = import_module("onnx_ir")
    values = [*model.graph.inputs]
    for node in model.graph:
        values += node.outputs
    for value in values:
        if value.shape is not None:
            value.shape = library.Shape([_named(each, names) for each in value.shape])


def _named(size: Any, names: Mapping[str, str]) -> Any:
    if isinstance(size, int) or size.value is None:
        return size
    return " + ".join(sorted(names.get(each, each) for each in size.value.split(" + ")))
