"""peftc export"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.export_model.export_options import MERGED, ExportOptions
from peftc.compiler.report import console, export_report
from peftc.compiler.report.facts import ExportFacts
from peftc.grammar.diagnostics import UsageError
from peftc.grammar.spec.elaborate import names_file
from peftc.grammar.spec.spec import Spec

DEFAULT = "default"

_WEIGHED = re.compile(r"(.+)=([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_NAMED = re.compile(r"([A-Za-z_][\w-]*)=(.+)", re.DOTALL)


def export(
    adapter_source: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|SPEC",
            help="A checkpoint's directory or Hub id, as it is or as NAME=CHECKPOINT; or an .adapter file, whose "
            "adapters are fresh.",
            show_default=False,
        ),
    ],
    model: arguments.Model,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", show_default=False, help="Write it there."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            "--into",
            metavar="ARTIFACT",
            show_default=False,
            help="Instead of -o: add the adapters to an artifact that takes them as inputs, or has rows choose.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="NAME=CHECKPOINT",
            help="One more checkpoint, and what its adapter is called; may be repeated.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["checkpoint", "pt2", "aoti", "onnx"],
        typer.Option(
            "--format",
            help="A checkpoint, or programs: torch.export's, machine code by AOTInductor, ONNX.",
        ),
    ] = "checkpoint",
    adapters: Annotated[
        Literal["merged", "inputs", "routed"],
        typer.Option(
            "--adapters",
            help="Of programs: in the weights, tensors passed with each call, or a bank that each row chooses from.",
        ),
    ] = "merged",
    entry: Annotated[
        Literal["forward", "generate"] | None,
        typer.Option(
            "--entry",
            help="Of programs: the plain forward, or prefill and decode, which it is where the model can.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME[=WEIGHT]",
            help="Which adapters, and with what weight they are merged; may be repeated. Without it all, or those that "
            "the spec activates.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="N",
            min=1,
            help="Of routed adapters: the rank that there is room for in those that --into adds later; the largest of "
            "those that are exported, unless said.",
            show_default=False,
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option("--max-batch-size", metavar="N", min=1, help="Of programs: the most rows.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            min=1,
            help="Of programs: the most tokens of a row, the cached among them.",
            show_default=False,
        ),
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            "--max-drift",
            metavar="X",
            min=0,
            help="Fail if outputs differ by more, in units of the largest.",
            show_default=False,
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement",
            metavar="X",
            min=0,
            max=1,
            help="Fail if fewer places prefer the same token.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help="Of checkpoints: of one file of weights, 5GB unless said.",
            show_default=False,
        ),
    ] = None,
    safe_merge: Annotated[bool, typer.Option("--safe-merge", help="Refuse values that are not finite.")] = False,
    quantized: arguments.Quantized = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR even if it holds more than an unchanged earlier export.")
    ] = False,
    use: arguments.Use = None,
    class_name: arguments.Class = None,
    task: arguments.Task = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Put adapters into a model and write it in a form that needs no peftc.

    That is a checkpoint that plain transformers loads, or programs that run where only torch is installed.
    DIR appears complete or not at all: a failure leaves what was there.
    """
    options = ExportOptions(
        format=format,
        adapters=adapters,
        entry=entry,
        rank=rank,
        max_batch_size=max_batch_size,
        max_length=max_length,
        max_drift=max_drift,
        min_agreement=min_agreement,
        max_shard_size=max_shard_size,
        safe_merge=safe_merge,
        quantized=quantized,
    )
    _check_place(out, into, options)
    _check_meant(options)
    chosen = _chosen(adapter or ())
    if isinstance(chosen, dict) and (into is not None or adapters != MERGED):
        raise typer.BadParameter("--adapter NAME=WEIGHT has no meaning here: what is not merged has no weight")
    with console.progress(not json) as progress:
        progress("loading the model")
        source = _source(adapter_source, also or ())
        found = compiler.find_model(
            model,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            class_name=class_name,
            task=task,
            adapters=source,
            quantize=source.quantize if isinstance(source, Spec) else None,
        )
        progress(f"writing {out or into}")
        added: Sequence[str] = ()
        facts: ExportFacts | None = None
        try:
            if into is not None:
                added = compiler.export_adapters(
                    source, found, into, adapter_names=adapter or None, use=use, seed=seed, force=force
                )
            elif out is not None:
                facts = compiler.export(
                    source,
                    found,
                    out,
                    adapter_names=chosen,
                    use=use,
                    seed=seed,
                    force=force,
                    **options.keywords(),
                )
        except UsageError as error:
            raise arguments.as_option(error) from error
    for each in found.warnings:
        console.warn(each)
    for each in found.notes:
        console.say(each)
    if facts is None:
        _say_added(added, str(into), json)
        return
    if json:
        console.write_json(facts.to_json())
        return
    if facts.generates and not facts.tokenizer:
        console.say(f"no tokenizer lies beside {model}: peftc run takes --ids")
    console.show(export_report.export_report(facts))


def _check_place(out: Path | None, into: Path | None, options: ExportOptions) -> None:
    if (out is None) == (into is None):
        raise typer.BadParameter("give -o DIR to write something new, or --into ARTIFACT to add adapters to it")
    said = [name for name in options.keywords() if name != "adapters"]
    if into is not None and said:
        flag = "--" + said[0].replace("_", "-")
        raise typer.BadParameter(f"{flag} has no meaning with --into: the artifact stays what it is")


def _chosen(given: Sequence[str]) -> list[str] | dict[str, float] | None:
    """The adapters that are named: with weights if one has a weight, and None where none is named."""
    if not any(map(_WEIGHED.fullmatch, given)):
        return list(given) or None
    weights: dict[str, float] = {}
    for each in given:
        match = _WEIGHED.fullmatch(each)
        name = match[1] if match else each
        if name in weights:
            raise typer.BadParameter(f"--adapter: {name!r} is named twice")
        weights[name] = float(match[2]) if match else 1.0
    return weights


def _say_added(files: Sequence[str], into: str, json: bool) -> None:
    if json:
        console.write_json({"directory": into, "files": list(files)})
    else:
        console.say(f"added to {into}: {', '.join(files)}")


def _check_meant(options: ExportOptions) -> None:
    found = options.unmeant()
    if found is not None:
        flag = "--" + found.option.replace("_", "-")
        raise typer.BadParameter(f"{flag} has no meaning here: {found.reason}; {found.help}")


def _source(first: str, also: Sequence[str]) -> Spec | str | dict[str, str]:
    """What the arguments name: a spec, a checkpoint, or several with names."""
    if names_file(first):
        if also:
            raise typer.BadParameter("--also adds a checkpoint to a checkpoint; a spec names all of its adapters")
        return compiler.read_spec(Path(first))
    named = _NAMED.fullmatch(first) if not Path(first).exists() else None
    if not also and named is None:
        return first
    found = {named[1]: named[2]} if named else {DEFAULT: first}
    for each in also:
        match = _NAMED.fullmatch(each)
        if match is None:
            raise typer.BadParameter(f"--also {each!r} is to be NAME=CHECKPOINT")
        if match[1] in found:
            raise typer.BadParameter(f"--also: there are two adapters called {match[1]!r}")
        found[match[1]] = match[2]
    return found
