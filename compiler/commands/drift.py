"""peftc drift"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftc import compiler
from peftc.compiler import console, report
from peftc.compiler.commands import arguments
from peftc.grammar.diagnostics import Diagnostic, UsageError
from peftc.grammar.spec import Spec

UNSAID = "E523"
Quantized = Literal["requantize", "dequantize"]
Type = Literal["float32", "bfloat16", "float16"]


def drift(
    adapters: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|SPEC",
            help="A checkpoint's directory or Hub id, or an .adapter file, whose adapters are fresh.",
            show_default=False,
        ),
    ],
    model: arguments.Model,
    dtype: Annotated[
        Type | None,
        typer.Option("--dtype", help="Convert the base to this type first.", show_default=False),
    ] = None,
    quantized: Annotated[
        Quantized | None,
        typer.Option(
            "--quantized",
            help="What becomes of weights that are quantized: packed again as they were, or dense.",
            show_default=False,
        ),
    ] = None,
    use: arguments.Use = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Tell what merging adapters would cost: the rounding of every weight, and what it does to the outputs.

    The model is called with its factory's example inputs, or with random tokens.
    """
    with console.progress(not json) as progress:
        progress("loading the model")
        source = compiler.read_spec(Path(adapters)) if _is_spec(adapters) else adapters
        found = compiler.find_model(
            model,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            # What is to be of another type is converted first, and packed then.
            quantize=source.quantize if isinstance(source, Spec) and dtype is None else None,
        )
        progress("merging")
        try:
            measured = compiler.drift(source, found, seed=seed, dtype=dtype, use=use, quantized=quantized)
        except UsageError as error:
            raise UsageError(*map(_as_option, error.diagnostics)) from error
    for each in found.warnings:
        console.warn(each)
    for each in found.notes:
        console.say(each)
    if json:
        console.write_json({**asdict(measured), "largest": measured.largest, "relative": measured.relative})
    else:
        console.show(report.drift_report(measured))


def _is_spec(adapters: str) -> bool:
    return adapters.endswith(".adapter") or Path(adapters).is_file()


def _as_option(problem: Diagnostic) -> Diagnostic:
    """That it is not said what becomes of quantized weights, told to someone who says it by an option."""
    if problem.code != UNSAID:
        return problem
    help = "--quantized requantize rounds the merged weights again, --quantized dequantize makes the model dense"
    return replace(problem, help=help)
