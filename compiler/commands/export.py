"""peftc export"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler import console
from peftc.compiler.commands import arguments
from peftc.grammar.diagnostics import UsageError
from peftc.grammar.elaborate import names_file
from peftc.grammar.spec import Spec


def export(
    adapters: arguments.Adapters,
    model: arguments.Model,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", show_default=False, help="Write the merged checkpoint there."),
    ],
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file of weights.")
    ] = "5GB",
    safe_merge: Annotated[bool, typer.Option("--safe-merge", help="Refuse values that are not finite.")] = False,
    quantized: arguments.Quantized = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR even if it holds more than an unchanged earlier export.")
    ] = False,
    use: arguments.Use = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Merge adapters into a model and write it as a checkpoint that plain transformers loads.

    DIR appears complete or not at all: a failure leaves what was there.
    """
    with console.progress(not json) as progress:
        progress("loading the model")
        source = compiler.read_spec(Path(adapters)) if names_file(adapters) else adapters
        found = compiler.find_model(
            model,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            quantize=source.quantize if isinstance(source, Spec) else None,
        )
        progress(f"writing {out}")
        try:
            facts = compiler.export(
                source,
                found,
                out,
                max_shard_size=max_shard_size,
                safe_merge=safe_merge,
                quantized=quantized,
                use=use,
                seed=seed,
                force=force,
            )
        except UsageError as error:
            raise arguments.as_option(error) from error
    for each in found.warnings:
        console.warn(each)
    for each in found.notes:
        console.say(each)
    if json:
        console.write_json(asdict(facts))
    else:
        console.say(f"{' + '.join(facts.adapters)} merged, {len(facts.files)} files in {facts.directory}")
