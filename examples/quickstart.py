"""Fine-tune, save, reload, generate and merge: the whole life of an adapter in one small program.

    python examples/quickstart.py [--steps 250] [--output build/quickstart-run]

The base is examples/tiny-llama with random weights, the text is examples/corpus.txt, and a token is a byte: nothing is
downloaded. A random base knows nothing, so the adapter learns everything from seven kilobytes; watch the loss fall.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from peftc import compiler

HERE = Path(__file__).parent
LENGTH = 64  # bytes in a training sample
PROMPT = "The keeper "

SPEC = """
adapter rhymes = lora(rank = 16, alpha = 32) {
    on    all linear
    train lm_head
}
"""


def main() -> None:
    arguments = read_arguments()
    if find_spec("accelerate") is None:
        sys.exit("transformers' Trainer needs accelerate, which is not installed here: pip install '.[train]'")
    torch.set_num_threads(1)  # so small a model gains nothing from more
    disable_progress_bar()
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig.from_pretrained(HERE / "tiny-llama")).eval()
    samples = read_samples(HERE / "corpus.txt")

    adapted = compiler.apply(base, SPEC)
    adapted.print_trainable_parameters()

    print(f"\ntraining on {len(samples)} samples of {LENGTH} bytes")
    losses = train(adapted, samples, arguments.steps, arguments.output / "trainer")
    if losses[-1] >= losses[0]:
        sys.exit(f"the loss did not fall: {losses[0]:.3f} -> {losses[-1]:.3f}")

    saved = arguments.output / "adapter"
    adapted.eval().save_pretrained(saved)
    print(f"\nsaved to {saved}: {', '.join(sorted(each.name for each in saved.iterdir()))}")

    reloaded = compiler.load(base, saved).eval()
    prompt = encode(PROMPT)[None]
    with torch.no_grad():
        check("reloaded == trained", reloaded(prompt).logits, adapted(prompt).logits)
        merged = reloaded.merge_and_unload()
        check("merged == unmerged", merged(prompt).logits, reloaded(prompt).logits)

    print(f"\nbase:    {complete(base, prompt)!r}")
    print(f"adapted: {complete(reloaded, prompt)!r}")
    print(f"merged:  {complete(merged, prompt)!r}")
    merged.save_pretrained(arguments.output / "merged")
    print(f"\nsaved the merged {type(merged).__name__} to {arguments.output / 'merged'}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="training steps")
    parser.add_argument("--output", type=Path, default=Path("build/quickstart-run"), help="where to write")
    return parser.parse_args()


def encode(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def decode(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def read_samples(file: Path) -> list[dict[str, torch.Tensor]]:
    tokens = encode(file.read_text(encoding="utf-8"))
    windows = tokens.unfold(0, LENGTH, LENGTH // 2)
    return [{"input_ids": each, "labels": each} for each in windows]


class PrintLoss(TrainerCallback):
    """One line for each loss the Trainer logs."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer."""
        if "loss" in logs:
            print(f"  step {state.global_step:4d}   loss {logs['loss']:.3f}")


def train(
    model: compiler.AdaptedModel, samples: list[dict[str, torch.Tensor]], steps: int, output: Path
) -> list[float]:
    """Train with transformers' own Trainer; returns the logged losses."""
    settings = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=samples, callbacks=[PrintLoss()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def complete(model: torch.nn.Module, prompt: torch.Tensor) -> str:
    set_seed(1)
    mask = torch.ones_like(prompt)
    tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=48, do_sample=True, temperature=0.6)
    return decode(tokens[0])


def check(claim: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((found - expected).abs().max())
    print(f"{claim}: largest difference {difference:.1e}")
    if difference > 1e-4:
        sys.exit(f"{claim} is false")


if __name__ == "__main__":
    main()
