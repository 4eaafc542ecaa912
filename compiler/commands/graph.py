"""peftc graph"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.export_model.output import write_bytes
from peftc.compiler.report import console


class Format(StrEnum):
    """What a diagram is written as."""

    dot = "dot"
    json = "json"
    svg = "svg"
    png = "png"
    pdf = "pdf"


_ENDINGS = {**{each.value: each for each in Format}, "gv": Format.dot, "": Format.dot}
_DRAWN = (Format.svg, Format.png, Format.pdf)
_NOT_TEXT = (Format.png, Format.pdf)


def graph(
    spec: arguments.Spec,
    model: arguments.Model,
    before: Annotated[bool, typer.Option("--before", help="The graph before the adapters.")] = False,
    after: Annotated[bool, typer.Option("--after", help="The graph with the active adapters (the default).")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="The graph with adapters, what is new or gone marked.")] = False,
    focus: Annotated[
        str | None,
        typer.Option(
            "--focus", metavar="SELECTOR", help="Only these modules, and what touches them.", show_default=False
        ),
    ] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="Draw every layer of a run of alike ones.")] = False,
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="By default what FILE ends in, or dot. Graphviz draws svg, png and pdf.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Instead of stdout.", show_default=False)
    ] = None,
    class_name: arguments.Class = None,
    task: arguments.Task = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: Annotated[bool, typer.Option("--json", help="As --format json; errors are JSON too.")] = False,
) -> None:
    """Draw a model's graph with the adapters of a spec."""
    which = _which(before, after, diff)
    form = _form(format, out, json)
    if form in _DRAWN:
        compiler.graphviz()  # what it lacks is told before a model is loaded
    with console.progress(not json) as progress:
        progress("loading the model")
        meant = compiler.read_spec(spec)
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
        progress(f"tracing {type(found.model).__name__}")
        picture = compiler.draw(meant, found, which=which, focus=focus, unfold=unfold, format=form)
    for each in found.warnings:
        console.warn(each)
    for each in found.notes:
        console.say(each)
    if not meant.active and which != "before":
        console.say("no adapter starts active: the spec has several and no 'activate'")
    if out is None:
        console.write(picture.decode())
    else:
        write_bytes(out, picture)
        if json:
            console.write_json({"written": str(out)})


def _which(before: bool, after: bool, diff: bool) -> Literal["before", "after", "diff"]:
    if before + after + diff > 1:
        raise typer.BadParameter("give one of --before, --after and --diff")
    return "before" if before else "diff" if diff else "after"


def _form(format: Format | None, out: Path | None, json: bool) -> Literal["dot", "json", "svg", "png", "pdf"]:
    if json and format not in (None, Format.json):
        raise typer.BadParameter(f"--json and --format {format} do not go together")
    if json or format is not None:
        form = Format.json if json else format
    else:
        ending = out.suffix.removeprefix(".").lower() if out else ""
        form = _ENDINGS.get(ending)
        if form is None:
            known = ", ".join(f".{each}" for each in Format)
            raise typer.BadParameter(f"nothing is drawn as .{ending}: let FILE end in {known}, or say --format")
    assert form is not None
    if out is None and form in _NOT_TEXT:
        raise typer.BadParameter(f"a {form} is no text for the terminal: give -o FILE")
    return form.value
