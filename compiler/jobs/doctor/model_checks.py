"""Checks of what peftc does with torch and transformers alone. Each returns what it saw, or raises."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from peftc.compiler.api import AdaptedModel, apply, load
from peftc.compiler.jobs.doctor import tiny
from peftc.compiler.jobs.doctor.verdict import CheckFailedError, agree, differ
from peftc.compiler.jobs.running import run
from peftc.passes.foreign.transformers import LOGITS

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
        adapted = apply(model, LINEAR)
        agree(
            tiny.scores(adapted, tiny.ids()), tiny.scores(model, tiny.ids()), f"{type(model).__name__}: graph and model"
        )
        names.append(type(model).__name__)
    return ", ".join(names)


@torch.no_grad()
def parity() -> str:
    """A new adapter changes nothing at all; a trained one gives the same merged and unmerged."""
    model = tiny.decoder()
    adapted = apply(model, LINEAR).eval()
    text = tiny.ids()
    plain = tiny.scores(model, text)
    fresh = tiny.scores(adapted, text)
    agree(fresh, plain, "outputs with a new adapter and the model's", exactly=True)
    return f"merged and unmerged differ by {_merged(adapted, plain, text):.1g}"


@torch.no_grad()
def accelerators() -> str:
    """What holds on the CPU holds on every other device that is there."""
    names = [name for name in devices() if name != "cpu"]
    text = tiny.ids()
    for name in names:
        model = tiny.decoder()
        adapted = apply(model, LINEAR).eval()
        tiny.move(adapted.parameters())
        expected = tiny.scores(adapted, text)
        moved = apply(model.to(name), LINEAR).eval()
        tiny.move(moved.parameters())
        agree(tiny.scores(moved, text.to(name)), expected, f"outputs on {name} and on the cpu")
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
    tiny.loss(adapted, tiny.ids()).backward()
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
    text = tiny.ids()
    with TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        files = sorted(path.name for path in Path(directory).iterdir())
        again = load(model, directory).eval()
        agree(tiny.scores(again, text), tiny.scores(adapted, text), "outputs of the adapter before and after")
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
        stepped = torch.stack(getattr(steps, LOGITS), dim=1)
        whole = tiny.scores_of_text(adapted, text, steps.sequences)[:, -NEW:]
        plain = tiny.scores_of_text(model, text, steps.sequences)[:, -NEW:]
        differ(whole, plain, f"{kind}: outputs with a prefix and without")
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


def _merged(adapted: AdaptedModel, plain: torch.Tensor, text: torch.Tensor) -> float:
    """How far merged and unmerged outputs are apart, at an adapter that does something."""
    tiny.move(adapted.parameters())
    unmerged = tiny.scores(adapted, text)
    differ(unmerged, plain, "outputs with a trained adapter and without")
    adapted.merge_adapter()
    difference = agree(tiny.scores(adapted, text), unmerged, "merged and unmerged outputs")
    adapted.unmerge_adapter()
    agree(tiny.scores(adapted, text), unmerged, "outputs after unmerging and before merging", exactly=True)
    return difference
