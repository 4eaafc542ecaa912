"""What rows with adapters of their own cost, against one adapter for all rows, beside PEFT's.

    python tests/benchmarks/mixed.py [--layers 6] [--width 512] [--adapters 16] [--rank 8] [--rounds 25] [--threads 1]

There are as many rows as adapters, each with its own. "changing" has another order of names at every call, "one row"
another name in one of the rows. `generate`
makes 16 tokens, and is compared with groups, one call for each adapter. Every number is a median of the ratios of
rounds in which all take turns.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from peftc import compiler

Run = Callable[[], object]


def models(arguments: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """Ours and PEFT's, with equal adapters on every linear layer, and their names."""
    torch.manual_seed(0)
    width = arguments.width
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=arguments.layers)
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    config = transformers.LlamaConfig(vocab_size=512, **sizes, **heads, max_position_embeddings=256, eos_token_id=None)
    base = transformers.LlamaForCausalLM(config).eval()
    names = [f"n{number}" for number in range(arguments.adapters)]
    lora = dict(r=arguments.rank, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**lora), adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**lora))
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = compiler.load(base, Path(directory) / names[0], adapter_name=names[0]).eval()
        for name in names[1:]:
            ours.load_adapter(Path(directory) / name, adapter_name=name)
    ours.set_adapter(names[0])
    theirs.set_adapter(names[0])
    return ours, theirs.eval(), names


def ratios(runs: dict[str, Run], rounds: int, over: str) -> dict[str, float]:
    """The median of each one's time over that of one of them, round by round."""
    for _ in range(2):
        for run in runs.values():
            run()
    taken: list[dict[str, float]] = []
    for _ in range(rounds):
        row = {}
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            row[name] = time.perf_counter() - start
        taken.append(row)
    return {name: statistics.median(row[name] / row[over] for row in taken) for name in runs}


def orders(names: list[str]) -> Callable[[], list[str]]:
    shifts = itertools.cycle([names[shift:] + names[:shift] for shift in range(len(names))])
    return lambda: next(shifts)


def exchanges(names: list[str]) -> Callable[[], list[str]]:
    rows, calls = list(names), itertools.count()

    def exchanged() -> list[str]:
        call = next(calls)
        rows[call % len(rows)] = names[(3 * call + call // len(names)) % len(names)]
        return list(rows)

    return exchanged


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 6), ("width", 512), ("adapters", 16), ("rank", 8), ("rounds", 25), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    ours, theirs, names = models(arguments)
    table = Table("tokens a row", "kept names", "one row", "changing", "peft", "ours / peft's")
    for tokens in (1, 16):
        ids, another = torch.randint(3, 512, (len(names), tokens)), orders(names)
        call = dict(input_ids=ids, use_cache=False)
        one = lambda call=call: ours(**call)  # noqa: E731
        rounds = arguments.rounds if tokens == 1 else arguments.rounds // 2
        changed = []
        for other in (exchanges(names), another):
            changing = {"one": one, "changing": lambda call=call, other=other: ours(**call, adapter_names=other())}
            changed.append(ratios(changing, rounds, "one")["changing"])
        found = ratios(
            {
                "one": one,
                "mixed": lambda call=call: ours(**call, adapter_names=names),
                "peft one": lambda call=call: theirs(**call),
                "peft": lambda call=call: theirs(**call, adapter_names=names),
            },
            rounds,
            "one",
        )
        peft_ratio = found["peft"] / found["peft one"]
        numbers = (found["mixed"], *changed, peft_ratio, found["mixed"] / found["peft"])
        table.add_row(str(tokens), *(f"{each:.2f}" for each in numbers))
    ids, more = torch.randint(3, 512, (len(names), 16)), dict(max_new_tokens=16, min_new_tokens=16)

    def groups() -> None:
        for row, name in enumerate(names):
            ours.set_adapter(name)
            ours.generate(input_ids=ids[row : row + 1], **more)
        ours.set_adapter(names[0])

    found = ratios(
        {
            "one": lambda: ours.generate(input_ids=ids, **more),
            "mixed": lambda: ours.generate(input_ids=ids, adapter_names=names, **more),
            "groups": groups,
        },
        max(3, arguments.rounds // 6),
        "one",
    )
    Console().print(table)
    print(f"generate: {found['mixed']:.2f} of one adapter's time, one group after the other {found['groups']:.2f}")


if __name__ == "__main__":
    main()
