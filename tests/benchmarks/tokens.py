"""What trained tokens of a large vocabulary cost: extra memory and time of a training step, against PEFT.

    python tests/benchmarks/tokens.py [--steps 5] [--dtype float32]

The model has 128,256 tokens of 2,048 numbers and two layers; 8 tokens are trained, in a batch of 64. Memory is the peak
of what torch allocates in a step (forward, backward, AdamW), over that of the plain model with gradients at its
embeddings. Time is the median; the three models take turns.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

from peftc import compiler
from peftc.runtime.base.share import share

TOKENS = [5, 17, 900, 12_345, 64_000, 100_000, 128_000, 128_255]
SIZES = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    print(f"| {'model':<7} | {'extra MiB: peftc':>16} | {'PEFT':>7} | {'ratio':>6} | {'ms a step: plain':>16} | "
          f"{'peftc':>6} | {'PEFT':>6} | {'peftc / PEFT':>12} |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for tied in (True, False):
        print(_row(tied, getattr(torch, arguments.dtype), arguments.steps), flush=True)


def _row(tied: bool, dtype: torch.dtype, steps: int) -> str:
    runs = _runs(tied, dtype)
    peaks = {name: _peak(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    ours, theirs = ((peaks[name] - peaks["plain"]) / 2**20 for name in ("peftc", "PEFT"))
    plain, own, other = (statistics.median(times[name]) for name in ("plain", "peftc", "PEFT"))
    name = "tied" if tied else "untied"
    return (
        f"| {name:<7} | {ours:>16.2f} | {theirs:>7.0f} | {ours / theirs:>6.4f} | {plain:>16.0f} | {own:>6.0f} | "
        f"{other:>6.0f} | {own / other:>12.2f} |"
    )


def _runs(tied: bool, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()
    modules = {} if tied else {"model.embed_tokens": TOKENS, "lm_head": TOKENS}
    plain, wrapped = share(model), share(model)
    plain.enable_input_require_grads()
    spec = f"adapter a = trainable_tokens {{ tokens {TOKENS}{' in embed_tokens, lm_head' if modules else ''} }}"
    tuned = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=list(modules) or None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(wrapped, tuned)
    ours = compiler.apply(model, spec)
    batch = torch.randint(SIZES["vocab_size"], (1, 64))
    batch[0, ::8] = torch.tensor(TOKENS)
    made = {"plain": plain, "peftc": ours, "PEFT": theirs}
    runs = {name: _step(each, batch) for name, each in made.items()}
    for run in runs.values():  # traces, and the optimisers' state
        run()
    return runs


def _step(model: Any, batch: torch.Tensor) -> Callable[[], object]:
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None

    def run() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def _peak(run: Callable[[], object]) -> int:
    """The most that torch has allocated at once while it runs, beyond what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


if __name__ == "__main__":
    main()
