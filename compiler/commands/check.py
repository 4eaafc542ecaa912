"""peftc check"""

from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console, report
from peftc.grammar.diagnostics import AdapterError, Diagnostic, ModelError, SpecError


def check(
    spec: arguments.Spec,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=arguments.MODEL_HELP, show_default=False)
    ] = None,
    class_name: arguments.Class = None,
    task: arguments.Task = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Tell everything that is wrong with a spec, on its own or for a model. Nothing is traced or written."""
    meant, problems = compiler.check(spec)
    found = None
    if model is not None:
        try:
            found = compiler.find_model(
                model,
                seed=seed,
                revision=revision,
                trust_remote_code=trust_remote_code,
                local_files_only=local_files_only,
                class_name=class_name,
                task=task,
                adapters=meant,
                quantize=None if meant is None else meant.quantize,
            )
        except (ModelError, SpecError) as error:
            problems += error.diagnostics
    for each in found.warnings if found else ():
        console.warn(each)
    adapters = None
    if found and meant:
        adapters, misfits = compiler.check_fit(meant, found)
        problems += misfits
    if problems or meant is None:
        raise _error(problems)
    if json:
        console.write_json({"ok": True, "spec": str(spec), "adapters": list(meant.names), "model": model})
        return
    if adapters is not None:
        console.show(report.adapters_report(adapters))
    count = len(meant.names)
    fits = "" if model is None else f", fits {model}"
    console.write(f"OK: {spec}: {count} {'adapter' if count == 1 else 'adapters'}{fits}\n")


def _error(problems: tuple[Diagnostic, ...]) -> AdapterError:
    return SpecError(*problems)
