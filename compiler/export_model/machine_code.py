"""Programs as machine code of this processor, by AOTInductor."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from peftc.compiler.export_model.noise import first_error, quiet
from peftc.compiler.export_model.sink import sink
from peftc.grammar.diagnostics import ModelError, UsageError, fail

# Its own check knows no sizes below 2, as torch takes 0 and 1 for constants when it traces.
_OPTIONS: dict[str, Any] = {"aot_inductor.package": True, "aot_inductor.check_lowerbound": False}


def check_compiler() -> None:
    """Raise UsageError where there is no C++ compiler, with which all machine code is made."""
    try:
        import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except RuntimeError as error:
        message = f"machine code is made by a C++ compiler, and none was found: {first_error(error)}"
        help = "install g++, or name yours in the environment variable CXX"
        fail(UsageError, "E650", message, help=help)


def save_machine_code(program: ExportedProgram, path: Path) -> None:
    """Compile a program into a package, a file ending in .pt2. It takes most of a minute.

    Raises ModelError where the compiler fails.
    """
    # What is made on the way is as large as the weights: it stays beside the target, on its disk, and goes at the end.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as directory, quiet():
        try:
            with _real_weights(program):
                files: Any = torch._inductor.aot_compile(
                    program.module(check_guards=False),
                    *_examples(program),
                    options={**_OPTIONS, "aot_inductor.output_path": directory},
                )
        except OSError:
            raise
        except Exception as error:  # whatever torch and the compiler that it calls have to complain about
            message = f"the program does not compile: {first_error(error)}"
            fail(ModelError, "E651", message, help="write format='pt2' instead, which is not compiled")
        made = [each for each in files if not str(each).endswith(".cpp")]  # no one needs the source
        with sink(path) as file:
            import_module("torch._inductor.package").package_aoti(file, made)


def _examples(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    return args, dict(kwargs)


@contextmanager
def _real_weights(program: ExportedProgram) -> Iterator[None]:
    """Let the program's weights, which are no fakes, stand among its values, which are."""
    mode: FakeTensorMode = next(iter(program.graph.nodes)).meta["val"].fake_mode
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before
