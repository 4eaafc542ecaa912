"""Checks of the optional libraries, each with what peftc uses it for. Each returns what it saw, or raises."""

import copy
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn

from peftc.compiler.api import apply
from peftc.compiler.jobs.doctor import tiny
from peftc.compiler.jobs.doctor.model_checks import LINEAR
from peftc.compiler.jobs.doctor.verdict import CheckFailedError, agree, differ
from peftc.passes.foreign.transformers import LABELS, MASK, TOKENS
from peftc.runtime.artifact.artifact import Artifact


@torch.no_grad()
def peft() -> str:
    """peft loads what peftc saved, and computes the same."""
    library = import_module("peft")
    model = tiny.decoder()
    adapted = apply(model, LINEAR).eval()
    tiny.move(adapted.parameters())
    text = tiny.ids()
    with TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        theirs = library.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()
        difference = agree(tiny.scores(adapted, text), tiny.scores(theirs, text), "outputs here and in peft")
    return f"outputs here and in peft differ by {difference:.1g}"


def accelerate() -> str:
    """transformers' Trainer, which needs accelerate, trains an adapted model."""
    adapted = apply(tiny.decoder(), LINEAR)
    tiny.move(adapted.parameters())
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    before = [parameter.detach().cpu().clone() for parameter in trained]
    rows = [{TOKENS: row, LABELS: row} for row in tiny.ids(rows=2)]
    with TemporaryDirectory() as directory:
        options = transformers.TrainingArguments(
            directory, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=0.1
        )
        loss = transformers.Trainer(model=adapted, args=options, train_dataset=rows).train().training_loss
    if any(torch.equal(now.detach().cpu(), then) for now, then in zip(trained, before, strict=True)):
        raise CheckFailedError("a step of Trainer left a trained tensor as it was")
    return f"a step of Trainer, with a loss of {loss:.2f}"


def bitsandbytes() -> str:
    """A base in four bits is adapted and trained."""
    spec = f"base {{ quantize = nf4() }} {LINEAR}"
    return _packed(apply(tiny.decoder(), spec))


def torchao() -> str:
    """A base in eight bits is adapted and trained."""
    library = import_module("torchao.quantization")
    model = tiny.decoder()
    library.quantize_(model.model, library.Int8WeightOnlyConfig())
    return _packed(apply(model, LINEAR))


def hqq() -> str:
    """A base in four bits is adapted and trained."""
    library = import_module("hqq.core.quantize")
    model = tiny.decoder()
    settings = library.BaseQuantizeConfig(nbits=4, group_size=32)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    packed = library.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
                    setattr(parent, name, packed)
    return _packed(apply(model, LINEAR))


@torch.no_grad()
def onnx() -> str:
    """A program is written as ONNX, and onnxruntime computes what the model does."""
    adapted = apply(tiny.decoder(), LINEAR).eval()
    tiny.move(adapted.parameters())
    text = tiny.ids()
    with TemporaryDirectory() as directory:
        target = Path(directory) / "program"
        adapted.export(target, format="onnx", entry="forward", max_length=32)
        logits = next(iter(Artifact.load(target)("forward", {TOKENS: text, MASK: torch.ones_like(text)}).values()))
    difference = agree(logits, tiny.scores(adapted, text), "outputs of onnxruntime and of the model")
    return f"outputs of onnxruntime and of the model differ by {difference:.1g}"


def trl() -> str:
    """trl can be imported beside peftc. Nothing of it is run: its trainers are transformers' Trainer."""
    import_module("trl").SFTTrainer  # noqa: B018 - it is found when it is asked for
    return "is imported; nothing was run"


def _packed(adapted: Any) -> str:
    """That an adapted model on a packed base computes, follows its adapter, and has gradients."""
    text = tiny.ids()
    with torch.no_grad():
        fresh = tiny.scores(adapted.eval(), text)
        tiny.move(adapted.parameters())
        trained = tiny.scores(adapted, text)
    if not trained.isfinite().all():
        raise CheckFailedError("outputs are not finite")
    differ(trained, fresh, "outputs with a trained adapter and with a new one")
    tiny.loss(adapted.train(), text).backward()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    without = sum(parameter.grad is None or not parameter.grad.any() for parameter in parameters)
    if without:
        raise CheckFailedError(f"{without} of {len(parameters)} trained tensors have no gradient")
    return f"{len(parameters)} tensors of the adapter have gradients on the packed base"
