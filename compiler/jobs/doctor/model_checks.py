"""Checks of what peftc does with torch and transformers alone. Each returns what it saw, or raises."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from peftc.compiler.api import AdaptedModel, apply, load
from peftc.compiler.jobs.doctor import tiny
from peftc.compiler.jobs.doctor.verdict import CheckFailedError, agree, differ
from peftc.compiler.jobs.running import run

LINEAR = "adapter checked = lora(rank = 4) { on all linear }"
FRONT = "adapter checked = prefix(length = 4)"
NEW = 4


def devices() -> dict[str, str]:
    """What torch can compute on here."""
    known = {"cpu": f"{torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        names = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        known["cuda"] = ", ".join(names)
    if torch.backends.mps.is_available():
        known["mps"] = "Apple's"
    return known


@torch.no_grad()
def trace() -> str:
    """A decoder and an encoder are traced, and their graphs give what they give."""
    names = []
    for model in (tiny.decoder(), tiny.encoder()):
        inputs = {"input_ids": tiny.ids()}
        adapted = apply(model, LINEAR, example_inputs=inputs)
        agree(adapted(**inputs).logits, model(**inputs).logits, f"{type(model).__name__}: graph and model")
        names.append(type(model).__name__)
    return ", ".join(names)


@torch.no_grad()
def parity() -> str:
    """A new adapter changes nothing at all; a trained one gives the same merged and unmerged."""
    model = tiny.decoder()
    adapted = apply(model, LINEAR).eval()
    inputs = {"input_ids": tiny.ids()}
    plain = model(**inputs).logits
    fresh = adapted(**inputs).logits
    agree(fresh, plain, "outputs with a new adapter and the model's", exactly=True)
    return f"merged and unmerged differ by {_merged(adapted, plain, inputs):.1g}"


@torch.no_grad()
def accelerators() -> str:
    """What holds on the CPU holds on every other device that is there."""
    names = [name for name in devices() if name != "cpu"]
    inputs = {"input_ids": tiny.ids()}
    for name in names:
        model = tiny.decoder()
        adapted = apply(model, LINEAR).eval()
        tiny.move(adapted.parameters())
        expected = adapted(**inputs).logits
        moved = apply(model.to(name), LINEAR).eval()
        tiny.move(moved.parameters())
        agree(moved(input_ids=inputs["input_ids"].to(name)).logits, expected, f"outputs on {name} and on the cpu")
    return ", ".join(names) or "none here but the cpu"


def training() -> str:
    """One step changes the adapter and not the model."""
    model = tiny.decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = apply(model, LINEAR).train()
    tiny.move(adapted.parameters())
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    old = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    adapted(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    optimizer.step()
    still = sum(torch.equal(parameter, start) for parameter, start in zip(trained, old, strict=True))
    if still:
        raise CheckFailedError(f"{still} of {len(trained)} trained tensors have no gradient")
    for name, tensor in model.state_dict().items():
        agree(tensor, before[name], f"the model's {name} after a step and before", exactly=True)
    return f"{len(trained)} tensors moved, the model did not"


@torch.no_grad()
def save_and_load() -> str:
    """What is saved and loaded again computes the same."""
    model = tiny.decoder()
    adapted = apply(model, LINEAR).eval()
    tiny.move(adapted.parameters())
    inputs = {"input_ids": tiny.ids()}
    with TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        files = sorted(path.name for path in Path(directory).iterdir())
        again = load(model, directory).eval()
        agree(again(**inputs).logits, adapted(**inputs).logits, "outputs of the adapter before and after")
    return ", ".join(files)


@torch.no_grad()
def prefix() -> str:
    """With a prefix, steps with a cache give what the whole text gives."""
    largest = 0.0
    for model in (tiny.decoder(), tiny.encoder_decoder()):
        kind = type(model).__name__
        adapted: Any = apply(model, FRONT).eval()
        tiny.move(adapted.parameters(), 1.0)
        text = tiny.ids(rows=1)
        steps = adapted.generate(
            text, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        stepped = torch.stack(steps.logits, dim=1)
        whole = _whole(adapted, text, steps.sequences)
        differ(whole, _whole(model, text, steps.sequences), f"{kind}: outputs with a prefix and without")
        largest = max(largest, agree(stepped, whole, f"{kind}: outputs of cached steps and of the whole text"))
    return f"cached steps and the whole text differ by {largest:.1g}"


@torch.no_grad()
def export() -> str:
    """A program that torch.export wrote is read back and generates the same tokens."""
    adapted: Any = apply(tiny.decoder(), LINEAR).eval()
    tiny.move(adapted.parameters())
    text = tiny.ids(rows=1)
    with TemporaryDirectory() as directory:
        target = Path(directory) / "program"
        adapted.export(target, format="pt2", entry="generate", max_length=32, max_drift=1e-3)
        tokens = run(target, [text[0].tolist()], max_new_tokens=NEW).completions[0].ids
        expected = adapted.generate(text, max_new_tokens=NEW, do_sample=False)[0, text.shape[1] :].tolist()
    if list(tokens) != expected:
        raise CheckFailedError(f"the program generates {list(tokens)}, the model {expected}")
    return f"a pt2 program generates {expected}"


def _merged(adapted: AdaptedModel, plain: torch.Tensor, inputs: dict[str, Any]) -> float:
    """How far merged and unmerged outputs are apart, at an adapter that does something."""
    tiny.move(adapted.parameters())
    unmerged = adapted(**inputs).logits
    differ(unmerged, plain, "outputs with a trained adapter and without")
    adapted.merge_adapter()
    difference = agree(adapted(**inputs).logits, unmerged, "merged and unmerged outputs")
    adapted.unmerge_adapter()
    agree(adapted(**inputs).logits, unmerged, "outputs after unmerging and before merging", exactly=True)
    return difference


def _whole(model: Any, text: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Logits for the generated tokens, from one call on all of them without a cache."""
    if model.config.is_encoder_decoder:
        logits = model(input_ids=text, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
    else:
        logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return logits[:, -NEW:]
