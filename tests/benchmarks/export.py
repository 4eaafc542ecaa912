"""Merging a checkpoint of a gigabyte: time and memory, against peft's merge_and_unload and save_pretrained.

Each way runs in a process of its own, on the same files, and starts with everything imported. Memory is the peak of
what the process holds of its own (anonymous), which files that are mapped are not part of, and of all that is resident.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from peftc import compiler

WAYS = ("peftc", "peft")


def make(root: Path, layers: int, width: int) -> None:
    """A base of random weights, and an adapter on all its linears."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=8192,
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(root / "base", max_shard_size="300MB")
    adapted = compiler.apply(base, "adapter a = lora(rank = 8) { on all linear }")
    for each in adapted.adapter_bank.parameters():
        torch.nn.init.normal_(each, std=0.02)
    adapted.save_pretrained(root / "adapter")


def merge(way: str, root: Path) -> dict[str, float]:
    """Merge and write, watched."""
    peaks = {"RssAnon": 0, "VmRSS": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    if way == "peft":
        merged = peft.PeftModel.from_pretrained(base, root / "adapter").merge_and_unload()
        merged.save_pretrained(root / way, max_shard_size="300MB")
    else:
        compiler.load(base, root / "adapter").export(root / way, max_shard_size="300MB")
    taken = time.perf_counter() - begun
    done.set()
    watcher.join()
    return {"seconds": taken, "own MB": peaks["RssAnon"] / 1e3, "resident MB": peaks["VmRSS"] / 1e3}


def same(root: Path) -> float:
    """The largest difference between the two results."""
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(root / way).state_dict() for way in WAYS)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main() -> None:
    """Print a table, or do one way's work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(merge(given.way, given.root)))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make(root, given.layers, given.width)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                shutil.rmtree(root / way, ignore_errors=True)
                command = [sys.executable, __file__, "--way", way, "--root", str(root)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        table = Table("what", *WAYS, "peftc / peft")
        for what in ("seconds", "own MB", "resident MB"):
            ours, theirs = (min(each[what] for each in found[way]) for way in WAYS)
            table.add_row(what, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}")
        Console().print(table)
        print(f"largest difference {same(root):.3g}")


if __name__ == "__main__":
    main()
