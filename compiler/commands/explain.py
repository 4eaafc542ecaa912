"""peftc explain"""

from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console, report


def explain(
    spec: arguments.Spec,
    model: arguments.Model,
    tokens: Annotated[
        list[int],
        typer.Option("--tokens", metavar="N", min=1, help="Of a call, batch times sequence; may be repeated."),
    ] = [1, 32, 1024],  # noqa: B006 - typer reads it
    why: Annotated[bool, typer.Option("--why", help="Trace, and tell what each pass left as it is, and why.")] = False,
    train: Annotated[bool, typer.Option("--train", help="With gradients, not for inference.")] = False,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Tell how each site is lowered, and what the alternatives would cost. Nothing is written; --why traces."""
    meant = compiler.read_spec(spec)
    found = compiler.find_model(
        model,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        local_files_only=local_files_only,
        quantize=meant.quantize,
    )
    facts = compiler.explain(meant, found, tokens=tokens, training=train, why=why)
    for each in facts.warnings:
        console.warn(each)
    if json:
        console.write_json(facts.to_json())
    else:
        console.show(report.explain_report(facts))
