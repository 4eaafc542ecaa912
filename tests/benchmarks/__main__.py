"""Measures an adapted model against PEFT and the plain model, interleaved in one run, and prints ratios.

    python tests/benchmarks [--layers 8] [--width 512] [--rounds 15] [--threads 1] [--compiled] [--depth]

Every number is a median over rounds in which all take turns, so that a machine's moods hit all alike. "whole" is peftc
with one graph of the whole model, `regions="model"`. Peak memory is that of a training step in a process of its own.
With --depth only first calls are measured: apply, a forward, a training step and a generate, for 4 and for 32 layers.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from peftc import compiler

RANK = 8
SPEC = f"adapter a = lora(rank = {RANK}, alpha = {2 * RANK}) {{ on all linear }}"
Run = Callable[[], object]


def llama(layers: int, width: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    return transformers.LlamaForCausalLM(config).eval()


def with_peft(model: torch.nn.Module) -> torch.nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def with_peftc(model: torch.nn.Module, regions: str = "layers") -> torch.nn.Module:
    return compiler.apply(model, SPEC, regions=regions).eval()


def whole(model: torch.nn.Module) -> torch.nn.Module:
    return with_peftc(model, "model")


def recomputing(model: torch.nn.Module) -> torch.nn.Module:
    """The model with gradient checkpointing on, PEFT's as its users have it."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns, after two turns that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def prefill(model: torch.nn.Module, length: int = 128) -> Run:
    ids = torch.randint(5, 2000, (1, length))

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    return run


def decode(model: torch.nn.Module, past: int = 64, tokens: int = 16) -> Run:
    """Some single-token steps from the same cache."""
    ids = torch.randint(5, 2000, (1, past))
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    filled = copy.deepcopy(full)

    def run() -> None:
        cache = copy.deepcopy(filled)
        with torch.no_grad():
            for step in range(tokens):
                mask = torch.ones(1, past + step + 1, dtype=torch.long)
                model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)

    return run


def generate(model: torch.nn.Module) -> Run:
    ids = torch.randint(5, 2000, (2, 32))
    mask = torch.ones_like(ids)
    return lambda: model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False
    )


def train(model: torch.nn.Module) -> Run:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    ids = torch.randint(5, 2000, (4, 64))
    model.train()

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def switching(base: torch.nn.Module) -> dict[str, Run]:
    theirs, ours = with_peft(base), with_peftc(base)
    theirs.add_adapter("b", theirs.peft_config["default"])
    ours.add_adapter(SPEC, "b")
    turns = {"peft": 0, "peftc": 0}

    def run(name: str, model: torch.nn.Module, names: tuple[str, str]) -> Run:
        def switch() -> None:
            turns[name] += 1
            model.set_adapter(names[turns[name] % 2])

        return switch

    return {"peft": run("peft", theirs, ("default", "b")), "peftc": run("peftc", ours, ("a", "b"))}


def loading(base: torch.nn.Module, directory: str, *, called: bool = False) -> dict[str, Run]:
    """Of an adapter like one that is there, which is let go of again; if it is `called`, with one token."""
    theirs, ours = with_peft(base), with_peftc(base)
    theirs.save_pretrained(directory)
    ids = torch.randint(5, 2000, (1, 1))

    def load(model: torch.nn.Module, first: str) -> Run:
        def run() -> None:
            model.load_adapter(directory, "loaded")
            if called:
                model.set_adapter("loaded")
                with torch.no_grad():
                    model(input_ids=ids)
                model.set_adapter(first)
            model.delete_adapter("loaded")

        return run

    return {"peft": load(theirs, "default"), "peftc": load(ours, "a")}


def first_calls(make: Callable[[torch.nn.Module], torch.nn.Module], layers: int) -> float:
    """Seconds until a model has been adapted, called, trained and generated with, once."""
    base, ids = llama(layers, 64), torch.randint(5, 2000, (2, 16))
    start = time.perf_counter()
    model = make(base)
    with torch.no_grad():
        model(input_ids=ids)
    train(model)()
    model.eval().generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return time.perf_counter() - start


def depths(rounds: int) -> None:
    """Prints what first calls cost, by depth."""
    makers = {"peft": with_peft, "peftc": with_peftc, "whole": whole}
    times = {(name, layers): list[float]() for layers in (4, 32) for name in makers}
    for turn in range(rounds + 1):
        for name, layers in times:
            taken = first_calls(makers[name], layers)
            if turn:  # the first turn loads code
                times[name, layers].append(taken)
    rows = {name: {f"{layers} layers": statistics.median(times[name, layers]) for layers in (4, 32)} for name in makers}
    report("First calls", rows, 1, "s")


def peak_memory(layers: int, width: int, *, recomputed: bool = False) -> dict[str, float]:
    """Megabytes a process grows by in two training steps, each library in a process of its own."""
    found = {}
    for name in ("peft", "peftc"):
        command = [sys.executable, __file__, "--memory", name, "--layers", str(layers), "--width", str(width)]
        command += ["--recomputed"] if recomputed else []
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(name: str, layers: int, width: int, recomputed: bool) -> float:
    """The growth of this process's peak while training, measured after everything is warm."""
    model = {"peft": with_peft, "peftc": with_peftc}[name](llama(layers, width))
    step = train(recomputing(model) if recomputed else model)
    peak = 0
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
        step()
    level = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak / 2**20


def report(title: str, rows: dict[str, dict[str, float]], unit: float, suffix: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    names = list(next(iter(rows.values())))
    reference = names[0]
    for name in names:
        table.add_column(name, justify="right")
    for name in names[1:]:
        table.add_column(f"{name} / {reference}", justify="right")
    for what, figures in rows.items():
        absolute = [f"{figures[name] * unit:.2f} {suffix}" for name in names]
        ratios = [f"{figures[name] / figures[reference]:.2f}" for name in names[1:]]
        table.add_row(what, *absolute, *ratios)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile, which takes minutes")
    parser.add_argument("--depth", action="store_true", help="only what first calls cost")
    parser.add_argument("--memory", choices=("peft", "peftc"), help=argparse.SUPPRESS)
    parser.add_argument("--recomputed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.depth:
        depths(max(1, options.rounds // 5))
        return
    if options.memory:
        print(json.dumps(measure_memory(options.memory, options.layers, options.width, options.recomputed)))
        return
    base = llama(options.layers, options.width)
    models = {"plain": base, "peft": with_peft(base), "peftc": with_peftc(base), "whole": whole(base)}
    works = {"prefill of 128 tokens": prefill, "16 decode steps": decode, "generate 16 tokens, batch 2": generate}
    eager = {
        what: interleaved({name: work(model) for name, model in models.items()}, options.rounds)
        for what, work in works.items()
    }
    report("Inference, eager", eager, 1e3, "ms")
    if options.compiled:
        compiled = {name: torch.compile(model, dynamic=True) for name, model in models.items()}
        rows = {
            what: interleaved({name: works[what](model) for name, model in compiled.items()}, options.rounds)
            for what in ("prefill of 128 tokens", "16 decode steps")
        }
        report("Inference, torch.compile(dynamic=True)", rows, 1e3, "ms")
    ours_and_theirs = {name: models[name] for name in ("peft", "peftc", "whole")}
    steps, peaks = {}, {}
    for recomputed in (False, True):
        what = "step, batch 4 x 64" + (", gradient checkpointing" if recomputed else "")
        training = {name: train(recomputing(model) if recomputed else model) for name, model in ours_and_theirs.items()}
        steps[what] = interleaved(training, options.rounds)
        peaks[what] = peak_memory(options.layers, options.width, recomputed=recomputed)
    report("Training", steps, 1e3, "ms")
    report("Training, peak memory of tensors", peaks, 1, "MB")
    with tempfile.TemporaryDirectory() as directory:
        changes = {
            "switch": interleaved(switching(base), 5 * options.rounds),
            "load and delete": interleaved(loading(base, directory), options.rounds),
            "load, activate, call and delete": interleaved(loading(base, directory, called=True), options.rounds),
        }
    report("Adapters", changes, 1e3, "ms")


if __name__ == "__main__":
    main()
