"""QLoRA with transformers' own Trainer: PEFT's losses, the dense model's curve, an untouched packed base."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers as hf

from peftc import compiler
from peftc.passes.quantized.schemes.known import packed_modules
from tests.matrix import wide
from tests.parity.training.test_train import Examples, GradientWatch, _bank, _losses, _start, _trainer
from tests.quantized_models import plain_kernels

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
DOUBLE = {**FOUR, "bnb_4bit_use_double_quant": True}
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "nf4": (torch.float32, DOUBLE),
    "nf4-bf16": (torch.bfloat16, {**DOUBLE, "bnb_4bit_compute_dtype": torch.bfloat16}),
    "nf4-single": (torch.float32, FOUR),
    "nf4-mixed": (torch.bfloat16, DOUBLE),
    "fp4": (torch.float32, {**FOUR, "bnb_4bit_quant_type": "fp4"}),
    "int8": (torch.float32, {"load_in_8bit": True}),
    "int8-bf16": (torch.bfloat16, {"load_in_8bit": True}),
}


class Bases:
    """One tiny Llama, quantized in many ways, each with one adapted model that keeps its traces."""

    def __init__(self, zoo: Any, directory: Path):
        self._directory = directory
        self.zoo = zoo
        self.start = directory / "start"
        zoo.model("llama").save_pretrained(directory / "base")
        zoo.peft("llama", peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained(self.start)
        self.examples = Examples(zoo, "llama")
        self.model = functools.cache(self.load)
        self._host = functools.cache(lambda kind: compiler.load(self.model(kind), self.start, is_trainable=True))

    def load(self, kind: str) -> Any:
        """A base of its own."""
        dtype, options = KINDS[kind]
        settings = hf.BitsAndBytesConfig(**options)
        return plain_kernels(
            hf.AutoModelForCausalLM.from_pretrained(
                self._directory / "base", quantization_config=settings, device_map={"": "cpu"}, dtype=dtype
            )
        )

    def ours(self, kind: str) -> Any:
        """The shared adapted model, its adapter back at the start."""
        host = self._host(kind)
        if "default" in host.active_adapters():
            host.delete_adapter("default")
        return _start(host, self.start)

    def prepared(self, kind: str) -> Any:
        """A base that PEFT has made ready."""
        return peft.prepare_model_for_kbit_training(self.load(kind), use_gradient_checkpointing=False)

    @contextmanager
    def untouched(self, kind: str) -> Iterator[None]:
        """The base is bit for bit the same after."""
        model = self.model(kind)
        before = [each.clone() for each in _tensors(model)]
        yield
        assert all(torch.equal(*each) for each in zip(_tensors(model), before, strict=True))


def _tensors(model: Any) -> list[torch.Tensor]:
    held = [part for each in packed_modules(model).values() for part in each.parts]
    assert len(held) >= 2 * 14
    return [*held, *model.parameters(), *model.buffers()]


@pytest.fixture(scope="module")
def bases(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(zoo, tmp_path_factory.mktemp("quantized"))


def _run(model: Any, bases: Bases, directory: Path, **options: Any) -> torch.Tensor:
    trainer = _trainer(model, bases.examples, directory, **options)
    trainer.train()
    return torch.tensor(_losses(trainer))


@pytest.mark.parametrize("kind", wide(KINDS, ("nf4-bf16",)))
def test_losses(kind: str, bases: Bases, tmp_path: Path) -> None:
    """The same operators in the same order: what is left is only how an adapter's result is added, in fp32."""
    theirs = peft.PeftModel.from_pretrained(bases.prepared(kind), bases.start, is_trainable=True)
    wanted = _run(theirs, bases, tmp_path)
    with bases.untouched(kind):
        ours, watch = bases.ours(kind), GradientWatch()
        trainer = _trainer(ours, bases.examples, tmp_path)
        trainer.add_callback(watch)
        trainer.train()
        got = torch.tensor(_losses(trainer))
    assert len(got) == 20
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    assert got[-4:].mean() < got[:4].mean() - 0.05
    assert watch.seen == set(_bank(ours))
    trained = peft.get_peft_model_state_dict(theirs)
    own = ours.adapter_state_dict("start")
    assert own.keys() == trained.keys()
    for key, value in trained.items():
        torch.testing.assert_close(own[key], value, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("kind", wide(KINDS, ("nf4",)))
def test_falls_as_the_dense_model_does(kind: str, bases: Bases, tmp_path: Path) -> None:
    """By as much in the end, and the curves are far closer to each other than to no learning at all.

    No closer than that: the weights differ by what was rounded away, and Adam makes steps of one size out of gradients
    of any. Without a step, losses differ by a tenth of what they fall by, on some processors by more.
    """
    runs: dict[str, list[torch.Tensor]] = {"quantized": [], "dense": []}
    with bases.zoo.hosted("llama") as shared:
        for rate in (0.0, 5e-3):
            runs["quantized"].append(_run(bases.ours(kind), bases, tmp_path, learning_rate=rate))
            runs["dense"].append(_run(_start(shared, bases.start), bases, tmp_path, learning_rate=rate))
    (rest, quantized), (dense_rest, dense) = runs["quantized"], runs["dense"]
    assert 0 < (rest - dense_rest).abs().max() < 0.01
    falls = [(before - after)[-4:].mean().item() for before, after in ((rest, quantized), (dense_rest, dense))]
    assert falls[1] > 0.1
    assert falls[0] == pytest.approx(falls[1], rel=0.2)
    assert _distance(quantized, dense) < _distance(rest, dense) / 5


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", wide(KINDS, ()))
def test_losses_are_those_of_a_dense_model_with_the_unpacked_weights(kind: str, bases: Bases, tmp_path: Path) -> None:
    dense = bases.load(kind).dequantize().float()
    wanted = _run(compiler.load(dense, bases.start, is_trainable=True), bases, tmp_path)
    # Where it computes in bfloat16, weights and activations are rounded to 8 bits.
    rounded = 5e-3 if "bf16" in kind or "mixed" in kind else 3e-5
    torch.testing.assert_close(_run(bases.ours(kind), bases, tmp_path), wanted, atol=rounded, rtol=0)


@pytest.mark.parametrize("kind", wide(KINDS, ("nf4-bf16",)))
def test_gradient_checkpointing(kind: str, bases: Bases, tmp_path: Path) -> None:
    runs = []
    with bases.untouched(kind):
        for checkpointing in (False, True):
            ours = bases.ours(kind)
            runs.append(_run(ours, bases, tmp_path, max_steps=4, activation_checkpointing=checkpointing))
            assert ours.is_gradient_checkpointing is checkpointing
            ours.gradient_checkpointing_disable()
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", wide(KINDS, ("nf4",)))
def test_resume(kind: str, bases: Bases, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(max_steps=6, save_strategy="steps", save_steps=3)
    with bases.untouched(kind):
        ours = bases.ours(kind)
        whole = _run(ours, bases, tmp_path, **options)
        wanted = _bank(ours)
        resumed = _trainer(bases.ours(kind), bases.examples, tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert _losses(resumed)[-3:] == whole[-3:].tolist()
    assert all(torch.equal(each, wanted[name]) for name, each in _bank(resumed.model).items())
    theirs = peft.PeftModel.from_pretrained(bases.prepared(kind), tmp_path / "checkpoint-6")
    for key, value in peft.get_peft_model_state_dict(theirs).items():
        assert torch.equal(resumed.model.adapter_state_dict("start")[key], value), key


def test_trainer_and_accelerate_take_it_as_adapted(bases: Bases, tmp_path: Path) -> None:
    """Both refuse a quantized model that has nothing to train."""
    with pytest.raises(ValueError, match="purely quantized"):
        _trainer(bases.model("nf4"), bases.examples, tmp_path)
    ours = bases.ours("nf4")
    hf.trainer_utils.validate_quantization_for_training(ours)
    assert accelerate.Accelerator(cpu=True).prepare(ours) is ours


@pytest.mark.parametrize("kind", wide(("nf4-bf16", "int8-bf16"), ()))
def test_a_base_that_peft_prepared(kind: str, bases: Bases, tmp_path: Path) -> None:
    """A user's habit: it changes the base, checkpointing included, and the losses stay."""
    prepared = peft.prepare_model_for_kbit_training(bases.load(kind))
    ours = compiler.load(prepared, bases.start, is_trainable=True)
    assert ours.is_gradient_checkpointing
    got = _run(ours, bases, tmp_path, max_steps=3)
    assert torch.equal(got, _run(bases.ours(kind), bases, tmp_path, max_steps=3))
