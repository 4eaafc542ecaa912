"""peftc explain"""

from pathlib import Path
from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.commands.explain_code import explain_code
from peftc.compiler.report import console, report

SPEC_OR_CODE = "An .adapter file; or without a MODEL the code of an error, such as E201."


def explain(
    spec: Annotated[str, typer.Argument(metavar="SPEC|CODE", help=SPEC_OR_CODE, show_default=False)],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=arguments.MODEL_HELP, show_default=False)
    ] = None,
    tokens: Annotated[
        list[int],
        typer.Option("--tokens", metavar="N", min=1, help="Of a call, batch times sequence; may be repeated."),
    ] = [1, 32, 1024],  # noqa: B006 - typer reads it
    why: Annotated[bool, typer.Option("--why", help="Trace, and tell what each pass left as it is, and why.")] = False,
    train: Annotated[bool, typer.Option("--train", help="With gradients, not for inference.")] = False,
    class_name: arguments.Class = None,
    task: arguments.Task = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Tell how each site is lowered, and what others would cost; or what an error code means. Only --why traces."""
    if model is None:
        if why:
            raise typer.BadParameter("--why tells of a spec and a model: an error code has an entry and no refusals")
        explain_code(spec, json)
        return
    meant = compiler.read_spec(Path(spec))
    found = compiler.find_model(
        model,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        local_files_only=local_files_only,
        class_name=class_name,
        task=task,
        adapters=meant,
        quantize=meant.quantize,
    )
    facts = compiler.explain(meant, found, tokens=tokens, training=train, why=why)
    for each in facts.warnings:
        console.warn(each)
    if json:
        console.write_json(facts.to_json())
    else:
        console.show(report.explain_report(facts))
