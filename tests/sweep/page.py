"""The page of architectures, made from the results of a sweep: `python -m tests.sweep.page RESULTS [NOTE]`."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Architectures

A tiny model with random weights of every type that transformers' auto classes know (and of some that diffusers and timm
have), with the same random LoRA on all its linear layers in PEFT and in peftc. peftc works where all of this is PEFT's:

- outputs, 1e-4 of the largest number, of two calls of different sizes, the first row padded where there is a mask,
- the gradient of every tensor of the adapter (nothing drops; in evaluation, unless `--training` was given),
- the tokens that `generate` finds, where the model generates, unless `--no-generate` was given (see below),
- outputs with merged weights.

What PEFT itself does not do (merge the weights of some modules, train on this machine) is not asked of peftc, and said
below. Models whose plain version is not *driven* (no batch was found that it takes, it needs what is not installed
here, or its config cannot be made small by the rules) say nothing about either library.

Made by the scripts in `tests/sweep`, which run each type in a process of its own:

```console
$ python -m tests.sweep --results build/models.json
$ python -m tests.sweep.page build/models.json
```

A type that is in the results is not run again; `--family`, `--only` and `--again` choose. `--quick` finds out
in minutes on which types PEFT works, and leaves peftc out."""
STATES = ("equal", "differs", "not compared", "peft fails", "not driven")
WORKS = STATES[:3]
SAID = {"equal": "peftc works", "differs": "peftc differs", "not compared": "PEFT works, peftc was not run"}
SEEING = "vision-language"
NOT_RUN = {"forward": "not run"}


def state(row: Mapping[str, Any]) -> str:
    """What came of a type."""
    if row["plain"] or row["peft"]:
        return "not driven" if row["plain"] else "peft fails"
    return "not compared" if row["ours"] == NOT_RUN else "differs" if row["ours"] else "equal"


def page(rows: list[Mapping[str, Any]], versions: str) -> str:
    """The whole page."""
    parts = [HEAD, versions, "\n".join(_summary(rows))]
    silent = [f"`{row['name']}`" for row in rows if state(row) == "equal" and not row.get("generated", True)]
    but = f", but of {', '.join(silent)}" if silent else ""
    parts.append(f"Generated tokens were compared of every model that generates{but}.")
    parts.append("## What is not PEFT's, or took too long\n\n" + "\n".join(_differing(rows)))
    parts.append("## What ran in Python\n\n" + "\n".join(_split(rows)))
    parts.append("## Every type\n\n" + "\n\n".join(_types(rows)))
    return "\n\n".join(parts) + "\n"


def _families(rows: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["family"], []).append(row)
    return found


def _summary(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "| family | types | driven | PEFT works | compared | peftc works |"
    yield "|---|---:|---:|---:|---:|---:|"
    for family, own in (*_families(rows).items(), ("**all**", rows)):
        states = [state(row) for row in own]
        equal, differs, left, failing = (states.count(each) for each in STATES[:4])
        peft = equal + differs + left
        yield f"| {family} | {len(own)} | {peft + failing} | {peft} | {equal + differs} | {equal} |"


def _differing(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    found = [row for row in rows if state(row) == "differs"]
    if not found:
        yield "Nothing."
        return
    yield "| type | what | why |"
    yield "|---|---|---|"
    for row in found:
        for what, why in row["ours"].items():
            yield f"| `{row['name']}` | {what} | {_cell(why)} |"


def _split(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "Modules whose forward was no one graph for some call: their own Python ran, and their parts were graphs."
    yield ""
    yield "| type | module | why |"
    yield "|---|---|---|"
    for row in rows:
        for module, why in row["split"].items():
            if state(row) in ("equal", "differs"):
                yield f"| `{row['name']}` | `{module}` | {_cell(why, 120)} |"


def _types(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    for family, own in _families(rows).items():
        yield f"### {family}"
        for each in WORKS:
            names = [f"`{row['name']}`" for row in own if state(row) == each]
            if names:
                yield f"{SAID[each]} ({len(names)}): {', '.join(names)}."
        blind = [f"`{row['name']}`" for row in own if state(row) in WORKS and not _seen(row)]
        if family == SEEING and blind:
            yield f"By text alone, since no batch with an image was found that the model takes: {', '.join(blind)}."
        rest = [row for row in own if state(row) not in WORKS]
        if rest:
            lines = ["| type | | why |", "|---|---|---|"]
            lines += [f"| `{row['name']}` | {state(row)} | {_cell(row['plain'] or row['peft'], 160)} |" for row in rest]
            yield "\n".join(lines)
        left = [
            (row["name"], what, why) for row in own for what, why in row["left"].items() if state(row) in STATES[:2]
        ]
        if left:
            lines = ["What PEFT does not do either:", "", "| type | what | why |", "|---|---|---|"]
            yield "\n".join(lines + [f"| `{name}` | {what} | {_cell(why, 120)} |" for name, what, why in left])


def _seen(row: Mapping[str, Any]) -> bool:
    """Whether a model was given an image."""
    return "pixel_values" in row.get("inputs", "") or "flattened_patches" in row.get("inputs", "")


def _cell(text: str, most: int = 200) -> str:
    """A text for a cell of a table: of one line, without what differs from run to run."""
    text = " ".join(text.replace("|", "/").replace("<", "&lt;").split())
    return text if len(text) <= most else text[: most - 3] + "..."


def installed() -> str:
    """What was compared."""
    from importlib.metadata import version

    return (
        "This table: "
        + ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers", "peft"))
        + "."
    )


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    note = "\n\n" + " ".join(sys.argv[2:]) if sys.argv[2:] else ""
    PAGE.write_text(page(list(found.values()), installed() + note), encoding="utf-8")
