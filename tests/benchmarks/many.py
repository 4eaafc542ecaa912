"""What many adapters cost: loading one after the other through a cache, and switching with all of them known.

    python tests/benchmarks/many.py [--adapters 1000] [--capacity 32] [--layers 4] [--width 256] [--rank 8]

First every adapter is asked for once, two to a call, and the model holds `capacity` of them. Memory is what the process
holds more than when the cache was full for the first time. Then all are kept, and loading and switching are timed as
their number grows.
"""

import argparse
import gc
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from peftc import compiler


def model_of(arguments: argparse.Namespace) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=arguments.width, intermediate_size=2 * arguments.width, num_hidden_layers=arguments.layers)
    config = transformers.LlamaConfig(vocab_size=512, **sizes, num_attention_heads=8, num_key_value_heads=4)
    return transformers.LlamaForCausalLM(config).eval()


def saved(arguments: argparse.Namespace, directory: Path) -> dict[str, Path]:
    """Names of adapters, and where they lie: so many files in turn."""
    files = []
    for number in range(min(8, arguments.adapters)):
        spec = f"adapter default = lora(rank = {arguments.rank}) {{ on all linear }}"
        compiler.apply(model_of(arguments), spec).save_pretrained(directory / str(number))
        files.append(directory / str(number))
    return dict(zip((f"n{number}" for number in range(arguments.adapters)), itertools.cycle(files), strict=False))


def resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def milliseconds(taken: Sequence[float]) -> float:
    return statistics.median(taken) * 1e3


def through_a_cache(model: Any, places: dict[str, Path], capacity: int) -> None:
    cache = compiler.AdapterCache(model, places, capacity)
    ids, names, taken, full = torch.ones(2, 4, dtype=torch.long), list(places), [], 0.0
    for start in range(0, len(names), 2):
        began = time.perf_counter()
        model(input_ids=ids, adapter_names=cache.fetch((names[start : start + 2] * 2)[:2]), use_cache=False)
        taken.append(time.perf_counter() - began)
        if len(cache.held) == min(capacity, len(names)) and not full:
            full = resident()
    few = max(1, len(taken) // 10)
    first, last = milliseconds(taken[1 : 1 + few]), milliseconds(taken[-few:])
    print(f"through a cache of {capacity}: two loaded and called {first:.1f} ms at first, {last:.1f} ms at last")
    print(f"memory beyond that of the full cache: {resident() - full:.1f} MB")
    cache.clear()


def all_kept(model: Any, places: dict[str, Path]) -> None:
    loads, switches = [], []
    for name, place in places.items():
        began = time.perf_counter()
        model.load_adapter(place, adapter_name=name)
        loads.append(time.perf_counter() - began)
    names = list(places)
    for name in (*names[-40:], *names[-40:]):
        began = time.perf_counter()
        model.set_adapter(name, inference_mode=True)
        switches.append(time.perf_counter() - began)
    few = max(1, len(loads) // 20)
    first, last = milliseconds(loads[1 : 1 + few]), milliseconds(loads[-few:])
    print(f"all kept: loading one {first:.2f} ms at first, {last:.2f} ms at last, {last / first:.2f} times")
    print(f"switching with {len(names)} known: {milliseconds(switches[40:]):.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser()
    numbers = (("adapters", 1000), ("capacity", 32), ("layers", 4), ("width", 256), ("rank", 8))
    for name, value in numbers:
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        places = saved(arguments, Path(directory))
        base = model_of(arguments)
        own = "adapter own = lora(rank = 2) { on q_proj }"
        through_a_cache(compiler.apply(base, own).eval(), places, arguments.capacity)
        all_kept(compiler.apply(base, own).eval(), places)


if __name__ == "__main__":
    main()
