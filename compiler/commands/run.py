"""peftc run"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console


def run(
    artifact: arguments.Artifact,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Go on from this text; may be repeated.", show_default=False
        ),
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--ids", metavar="N,N,...", help="Go on from these tokens; may be repeated.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Stop after so many; 20, unless said."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="Of the adapters in the artifact; where they are routed, once or for each prompt.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens, instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", metavar="X", help="With --sample.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="N", help="With --sample: of so many.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="X", help="With --sample: of so much probability.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="With --sample: draw the same again.", show_default=False)
    ] = None,
    verify: arguments.Verify = True,
    json: arguments.Json = False,
) -> None:
    """Generate text from an exported artifact, with torch alone.

    Prints what follows the prompt as it comes; with several prompts, each when all are done. No chat template is
    applied. An artifact without a tokenizer takes and prints numbers of tokens.
    """
    if not sample and (temperature, top_k, top_p, seed) != (1.0, None, None, None):
        raise typer.BadParameter("--temperature, --top-k, --top-p and --seed need --sample")
    prompts: list[str | list[int]] = [*(prompt or ()), *(_numbers(each) for each in ids or ())]
    streaming = len(prompts) == 1 and not json
    with console.progress(not json) as progress:
        progress(f"loading {artifact}")
        sampling = compiler.Sampling(temperature, top_k, top_p, seed) if sample else None
        loaded = compiler.Artifact.load(artifact, verify=verify)
        loaded.prepare()
    facts = compiler.run(
        loaded,
        prompts,
        max_new_tokens=max_new_tokens,
        adapter=adapter[0] if adapter and len(adapter) == 1 else adapter or None,
        sampling=sampling,
        on_piece=_show if streaming else None,
    )
    if json:
        console.write_json({**asdict(facts), "tokens": facts.tokens})
        return
    if streaming:
        console.write("\n")
    else:
        for given, each in zip(prompts, facts.completions, strict=True):
            shown = given if isinstance(given, str) else _joined(given)
            console.write(f"> {shown}\n{_joined(each.ids) if each.text is None else each.text}\n\n")
    console.say(f"{facts.tokens} tokens in {facts.seconds:.2f} s, {facts.tokens / facts.seconds:,.1f} a second")


def _show(row: int, piece: str) -> None:
    console.write(piece)
    sys.stdout.flush()


def _joined(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--ids {text!r} is not a list of whole numbers, such as 1,2,3") from error
