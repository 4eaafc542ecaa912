"""Every architecture, compared with peft: `python -m tests.sweep --results FILE --family causal`, then `--write`.

Results are kept in a JSON file; a type that is in it is not run again, unless `--again` names it or its state.
"""

import argparse
import json
import os
import resource
import select
import signal
import time
import warnings
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 150, 8 << 30


def main() -> None:
    options = parsed()
    kept = json.loads(options.results.read_text()) if options.results.exists() else {}
    from tests.sweep.compare import warm
    from tests.sweep.families import FAMILIES, made, types_of  # after the options are read: it imports everything

    began = time.monotonic()
    warm(*made("causal", "llama"))  # what torch loads at a first call is loaded once
    print(f"ready after {time.monotonic() - began:.0f}s")

    for family in options.family or list(FAMILIES):
        for name in types_of(family):
            key = f"{family}/{name}"
            if options.only and name not in options.only:
                continue
            if key in kept and not options.only and state(kept[key]) not in options.again:
                continue
            kept = json.loads(options.results.read_text()) if options.results.exists() else {}
            kept[key] = in_child(family, name, options)
            options.results.write_text(json.dumps(kept, indent=1))
            told(kept[key])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--family", nargs="*")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--again", nargs="*", default=[], help="states to run again: equal, differs, peft, plain")
    parser.add_argument("--training", action="store_true", help="gradients of models that are in training")
    parser.add_argument("--quick", action="store_true", help="only what works without peftc")
    parser.add_argument("--no-generate", action="store_true", help="leave generated tokens out, which take longest")
    parser.add_argument("--trace", action="store_true", help="print tracebacks")
    return parser.parse_args()


def state(row: dict[str, Any]) -> str:
    return "plain" if row["plain"] else "peft" if row["peft"] else "differs" if row["ours"] else "equal"


def told(row: dict[str, Any]) -> None:
    what = row["plain"] or row["peft"] or "; ".join(f"{key}: {each}" for key, each in row["ours"].items())
    left = "".join(f" [{key} left: {each[:60]}]" for key, each in row["left"].items())
    print(f"{row['family']}/{row['name']}: {state(row)} {row['seconds']:.0f}s {what[:260]}{left}", flush=True)


def in_child(family: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one type, made in a process of its own: a crash is a row."""
    read, write = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        run_child(family, name, write, options)
    os.close(write)
    text, status = waited(child, read, began)
    row: dict[str, Any] = {
        "family": family,
        "name": name,
        "plain": "",
        "peft": "",
        "ours": {},
        "left": {},
        "split": {},
        "inputs": "",
    }
    lines = [json.loads(each) for each in text.decode().splitlines() if each]
    if lines:
        row = lines[-1]
    if status != 0:
        why = (
            f"took more than {SECONDS} s"
            if status == signal.SIGKILL
            else f"the process ended with signal {status & 127}"
        )
        stage = row.pop("stage", "plain")
        if stage == "plain":
            row["plain"] = why
        elif stage == "peft":
            row["peft"] = why
        else:
            row["ours"][stage] = why
    row.pop("stage", None)
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def waited(child: int, read: int, began: float) -> tuple[bytes, int]:
    text = b""
    while True:
        left = SECONDS - (time.monotonic() - began)
        ready, _, _ = select.select([read], [], [], max(0.0, left))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        got = os.read(read, 1 << 16)
        if not got:
            break
        text += got
    os.close(read)
    return text, os.waitpid(child, 0)[1]


def run_child(family: str, name: str, write: int, options: argparse.Namespace) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        warnings.filterwarnings("ignore")
        if not options.trace:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
        from tests.sweep.compare import Row, compared, said
        from tests.sweep.families import made

        row = Row(family, name)

        def tell(stage: str) -> None:
            os.write(write, (json.dumps({**row.as_json(), "stage": stage}) + "\n").encode())

        tell("plain")
        try:
            model, size = made(family, name)
            compared(row, model, size, tell, options.training, options.quick, not options.no_generate)
        except BaseException as error:
            row.plain = said(error)
        os.write(write, (json.dumps(row.as_json()) + "\n").encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
