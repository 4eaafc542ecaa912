"""What training and calling a quantized model costs: memory and time, against PEFT and an adapter on the dense model.

    python tests/benchmarks/quantized.py [--kind nf4] [--width 1024] [--layers 4] [--rounds 5] [--rows 1] [--length 128]

A Llama of random weights with LoRA of rank 8 on every linear layer, in bfloat16 (`nf4`, `int8`) or float32 (`nf4-fp32`,
`int8-fp32`); its norms, head and adapters are in float32, as QLoRA has them. Memory is that of tensors: at rest, every
one that a process of its own holds; in a step (forward, backward, AdamW), the most that the allocator has given out
beyond that. The models take turns, and the fastest turn counts, since a busy machine only ever adds time.

With its AVX-512 kernel, bitsandbytes computes in bfloat16 and repacks weights in evaluation mode, whatever the compute
type: losses and merges then are off (see tests/parity). PEFT's exact numbers are those without it; both are shown.
"""

import argparse
import copy
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from peftc import compiler

RANK = 8
SPEC = f"adapter a = lora(rank = {RANK}, alpha = {2 * RANK}) {{ on all linear }}"
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "nf4": (torch.bfloat16, {**FOUR, "bnb_4bit_compute_dtype": torch.bfloat16}),
    "nf4-fp32": (torch.float32, {**FOUR, "bnb_4bit_compute_dtype": torch.float32}),
    "int8": (torch.bfloat16, {"load_in_8bit": True}),
    "int8-fp32": (torch.float32, {"load_in_8bit": True}),
}
TRAINED = ("peftc", "PEFT", "dense")
KERNEL = " + kernel"
Run = Callable[[], object]


def main() -> None:
    """Measure, and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="nf4")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=TRAINED, help=argparse.SUPPRESS)
    parser.add_argument("--recomputed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.manual_seed(0)
    if options.memory:
        print(json.dumps(memory(options)))
        return
    with tempfile.TemporaryDirectory() as directory:
        options.base = directory
        _llama(options).save_pretrained(directory)
        _report("Training, MiB of tensors", _memories(options), "{:.0f}")
        _report(f"Training, ms a step of {options.rows} x {options.length}", _steps(options), "{:.0f}")
        _report("Inference, ms", _calls(options), "{:.0f}")


def _llama(options: argparse.Namespace) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 128,
    )
    return transformers.LlamaForCausalLM(config).to(KINDS[options.kind][0])


def _dense(options: argparse.Namespace) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=KINDS[options.kind][0])


def _quantized(options: argparse.Namespace, *, kernel: bool = False) -> Any:
    dtype, settings = KINDS[options.kind]
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.base, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu &= kernel
    return model


def _with_peft(model: Any, *, training: bool = False) -> Any:
    if training:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))


def _trained(name: str, options: argparse.Namespace) -> Any:
    match name:
        case "peftc":
            model = compiler.apply(_quantized(options), SPEC)
        case "PEFT":
            model = _with_peft(_quantized(options), training=True)
        case _:
            model = compiler.apply(_dense(options), SPEC)
    return model.train()


def _recomputing(model: Any, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def _step(model: Any, options: argparse.Namespace) -> Run:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    ids = torch.randint(5, 2000, (options.rows, options.length))

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _memories(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for recomputed in (False, True):
        suffix = ", gradient checkpointing" if recomputed else ""
        for name in TRAINED:
            found = _in_a_process_of_its_own(name, recomputed, options)
            rows.setdefault("at rest", {})[name] = found["rest"]
            rows.setdefault(f"a step beyond that{suffix}", {})[name] = found["step"]
            rows.setdefault(f"peak{suffix}", {})[name] = found["rest"] + found["step"]
    return rows


def _in_a_process_of_its_own(name: str, recomputed: bool, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", name, "--base", options.base]
    for each in ("kind", "width", "layers", "rows", "length"):
        command += [f"--{each}", str(getattr(options, each))]
    command += ["--recomputed"] if recomputed else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(options: argparse.Namespace) -> dict[str, float]:
    """MiB of tensors that this process holds between steps, and how many more at most in one."""
    model = _trained(options.memory, options)
    _recomputing(model, options.recomputed)
    step = _step(model, options)
    step()
    step()
    gc.collect()
    held = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if issubclass(type(each), torch.Tensor) and type(each).__name__ != "FakeTensor" and each.device.type == "cpu"
    }
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return {"rest": sum(held.values()) / 2**20, "step": peak / 2**20}


def _steps(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    models = {name: _trained(name, options) for name in TRAINED}
    rows = {}
    for recomputed in (False, True):
        for model in models.values():
            _recomputing(model, recomputed)
        runs = {name: _step(model, options) for name, model in models.items()}
        rows["step" + (", gradient checkpointing" if recomputed else "")] = _interleaved(runs, options.rounds)
    return rows


def _calls(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    models = {
        "peftc": compiler.apply(_quantized(options), SPEC, prepare_for_kbit_training=False),
        "PEFT": _with_peft(_quantized(options)),
        "plain": _quantized(options),
    }
    if options.kind.startswith("nf4"):
        models[f"PEFT{KERNEL}"] = _with_peft(_quantized(options, kernel=True))
        models[f"plain{KERNEL}"] = _quantized(options, kernel=True)
    for model in models.values():
        model.eval().requires_grad_(False)
    works = {"prefill": _prefill, "8 decode steps": _decode}
    return {
        what: _interleaved({name: work(model, options) for name, model in models.items()}, options.rounds)
        for what, work in works.items()
    }


def _prefill(model: Any, options: argparse.Namespace) -> Run:
    ids = torch.randint(5, 2000, (options.rows, options.length))

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    return run


def _decode(model: Any, options: argparse.Namespace, past: int = 64, tokens: int = 8) -> Run:
    ids = torch.randint(5, 2000, (1, past))
    with torch.no_grad():
        filled = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values

    def run() -> None:
        cache = copy.deepcopy(filled)
        with torch.no_grad():
            for step in range(tokens):
                mask = torch.ones(1, past + step + 1, dtype=torch.long)
                model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)

    return run


def _interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest turn of each, after one turn that does not count.

    With one thread, the processor's time is taken, which leaves out what other programs do.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                times[name].append(1000 * (clock() - start))
    return {name: min(each) for name, each in times.items()}


def _report(title: str, rows: dict[str, dict[str, float]], form: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    names = list(next(iter(rows.values())))
    for name in names:
        table.add_column(name, justify="right")
    for name in names[1:]:
        table.add_column(f"peftc / {name}", justify="right")
    for what, figures in rows.items():
        ratios = [f"{figures['peftc'] / figures[name]:.2f}" for name in names[1:]]
        table.add_row(what, *(form.format(figures[name]) for name in names), *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
