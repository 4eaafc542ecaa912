"""Prefill and decode of exported programs, against transformers and PEFT, interleaved in one process.

    python tests/benchmarks/decode.py [--layers 6] [--width 256] [--prompt 64] [--tokens 16] [--rounds 20] [--threads 1]

A Llama of random weights in float32, with LoRA of rank 8 on every linear layer, one row. Eager: `transformers` is the
model without an adapter, `PEFT` and `peftc` have it unmerged, `PEFT merged` went through merge_and_unload. `pt2` and
`aoti` are what peftc exports with the adapter merged, called through the runner, its checks included. That all but the
first give the same logits is checked before. The ways take turns, and the fastest turn counts, since a busy machine
only ever adds time; with one thread, the processor's time is taken, which leaves out what other programs do.
"""

import argparse
import copy
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from peftc import compiler
from peftc.runtime.artifact.artifact import Artifact

RANK, VOCABULARY = 8, 2048
REFERENCE = "transformers"


@dataclass(frozen=True)
class Way:
    """A way to run the model: prefill gives a state, decode takes one, a token and its place, and gives the next."""

    prefill: Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
    decode: Callable[[torch.Tensor, int, Any], tuple[torch.Tensor, Any]]
    again: Callable[[Any], Any]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (1, options.prompt))
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        ways = _ways(options, Path(directory))
        _check_same(ways, ids)
        prefill = _interleaved({name: _prefill(way, ids) for name, way in ways.items()}, options.rounds)
        decode = _interleaved({name: _decode(way, ids, options.tokens) for name, way in ways.items()}, options.rounds)
    table = Table(title=_title(options), title_justify="left")
    columns = (f"prefill of {options.prompt}", "decode, a token")
    for each in ("", columns[0], f"/ {REFERENCE}", columns[1], f"/ {REFERENCE}"):
        table.add_column(each, justify="right" if each else "left")
    for name in ways:
        cells = []
        for found, part in ((prefill, 1), (decode, options.tokens)):
            cells += [f"{found[name] / part:.2f} ms", f"{found[name] / found[REFERENCE]:.2f}"]
        table.add_row(name, *cells)
    Console(width=110).print(table)


def _title(options: argparse.Namespace) -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    model = (
        f"Llama, {options.layers} layers of {options.width}, LoRA of rank {RANK} on all linears, {options.prompt} past"
    )
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, threads: {options.threads}"
    return f"{model}\n{versions}, {kind}"


def _ways(options: argparse.Namespace, directory: Path) -> dict[str, Way]:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    theirs.save_pretrained(directory / "adapter")
    ours = compiler.load(copy.deepcopy(base), directory / "adapter").eval()
    for format in ("pt2", "aoti"):
        ours.export(directory / format, format=format, adapters="merged")
    return {
        REFERENCE: _eager(base),
        "PEFT": _eager(theirs),
        "PEFT merged": _eager(copy.deepcopy(theirs).merge_and_unload()),
        "peftc": _eager(ours),
        "pt2": _exported(Artifact.load(directory / "pt2")),
        "aoti": _exported(Artifact.load(directory / "aoti")),
    }


def _eager(model: Any) -> Way:
    def prefill(ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        mask = torch.ones_like(ids)
        made = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        return made.logits, made.past_key_values

    def decode(token: torch.Tensor, place: int, cache: Any) -> tuple[torch.Tensor, Any]:
        mask = torch.ones(1, place + 1, dtype=torch.int64)
        made = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return made.logits, made.past_key_values

    return Way(prefill, decode, _again)


def _again(cache: Any) -> Any:
    """Another cache of the same tensors: one that is decoded with grows."""
    made = DynamicCache()
    for index, layer in enumerate(cache.layers):
        made.update(layer.keys, layer.values, index)
    return made


def _exported(artifact: Artifact) -> Way:
    artifact.prepare()
    entries = artifact.manifest.entries
    first = entries["prefill"]
    empty = {
        each.name: torch.zeros([size.value({"batch": 1, "past": 0}) for size in each.shape])
        for each in first.inputs
        if each.name in first.state.values()
    }

    def call(entry: str, ids: torch.Tensor, past: int, state: Any) -> tuple[torch.Tensor, Any]:
        total = past + ids.shape[1]
        mask, positions = torch.ones(1, total, dtype=torch.int64), torch.arange(past, total)[None]
        outputs = artifact(entry, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **state})
        return outputs["logits"], {
            entries[entry].state[key]: value for key, value in outputs.items() if key != "logits"
        }

    return Way(
        lambda ids: call("prefill", ids, 0, empty),
        lambda token, place, state: call("decode", token, place, state),
        dict,
    )


def _check_same(ways: dict[str, Way], ids: torch.Tensor) -> None:
    """What has the adapter gives the same, and not what the model gives without it."""
    found = {}
    for name, way in ways.items():
        _, state = way.prefill(ids)
        found[name], _ = way.decode(ids[:, :1], ids.shape[1], state)
    for name, logits in found.items():
        if name != REFERENCE:
            torch.testing.assert_close(
                logits, found["PEFT"], rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert not torch.allclose(found[REFERENCE], found["PEFT"], atol=0.1)


Run = tuple[Callable[[], Any], Callable[[Any], object]]
"""What is made ready, and what is measured with it."""


def _prefill(way: Way, ids: torch.Tensor) -> Run:
    return lambda: None, lambda _: way.prefill(ids)


def _decode(way: Way, ids: torch.Tensor, tokens: int) -> Run:
    logits, filled = way.prefill(ids)
    token = logits.argmax(-1)

    def run(state: Any) -> None:
        following = token
        for step in range(tokens):
            made, state = way.decode(following, ids.shape[1] + step, state)
            following = made.argmax(-1)

    return lambda: way.again(filled), run


def _interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest turn of each, after two turns that do not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, (prepare, run) in runs.items():
            state = prepare()
            start = clock()
            run(state)
            if turn > 1:
                times[name].append(1000 * (clock() - start))
    return {name: min(each) for name, each in times.items()}


if __name__ == "__main__":
    main()
