"""transformers' own Trainer: PEFT's losses, an untouched base, checkpoints that resume."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests.matrix import wide

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", dict(target_modules=["q_proj", "v_proj", "down_proj"]), {}),
    "accumulated": ("llama", dict(target_modules="all-linear"), dict(gradient_accumulation_steps=2)),
    "tied": ("tied", dict(target_modules=["embed_tokens", "v_proj"]), {}),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "c_fc"], bias="lora_only", fan_in_fan_out=True), {}),
    "bert": ("bert", dict(target_modules=["query", "value"], modules_to_save=["classifier"]), {}),
    "t5": ("t5", dict(target_modules=["q", "v", "wo"]), {}),
    "moe": ("moe", dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]), {}),
}


class Examples(torch.utils.data.Dataset):
    """Rows of random tokens with labels."""

    def __init__(self, zoo: Any, name: str, count: int = 24):
        batch = zoo.batch(name, count, 8, seed=77)
        batch.pop("decoder_input_ids", None)
        self._columns = {**batch, "labels": zoo.labels(name, count, 8)}
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


class GradientWatch(hf.TrainerCallback):
    """Remembers which parameters had a gradient before any step."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen |= {name for name, each in model.named_parameters() if each.grad is not None}


def _trainer(model: Any, examples: Any, directory: Path, **options: Any) -> hf.Trainer:
    defaults = dict(
        output_dir=str(directory),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
        dataloader_pin_memory=False,
    )
    arguments = hf.TrainingArguments(**{**defaults, **options})
    return hf.Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)


def _losses(trainer: hf.Trainer) -> list[float]:
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def _start(ours: Any, directory: Path) -> Any:
    """The shared model with its adapter as the checkpoint has it."""
    if "start" in ours.active_adapters():
        ours.delete_adapter("start")
    ours.load_adapter(directory, "start", is_trainable=True)
    ours.set_adapter("start")
    return ours


@pytest.mark.parametrize("case", wide(CASES, ("llama",)))
def test_losses(case: str, zoo: Any, tmp_path: Path) -> None:
    name, fields, options = CASES[case]
    zoo.peft(name, peft.LoraConfig(r=4, **fields)).save_pretrained(tmp_path / "start")
    examples = Examples(zoo, name)
    model = zoo.model(name)
    before = zoo.snapshot(model)
    theirs = zoo.reference(name, tmp_path / "start", is_trainable=True)
    with zoo.hosted(name) as shared:
        ours = _start(shared, tmp_path / "start")
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
        watch = GradientWatch()
        trainers = [_trainer(each, examples, tmp_path / "run", **options) for each in (ours, theirs)]
        trainers[0].add_callback(watch)
        for trainer in trainers:
            trainer.train()
        got, wanted = (torch.tensor(_losses(each)) for each in trainers)
        assert len(got) == 20
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
        assert got[-4:].mean() < got[:4].mean() - 0.01
        bank = {each for each, _ in ours.named_parameters() if each.startswith("adapter_bank.start.")}
        assert watch.seen == bank
        before.check()
        state = ours.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), key
        zoo.same(ours.eval(), theirs.eval(), name, base=model)


def test_losses_can_differ(zoo: Any, tmp_path: Path) -> None:
    zoo.peft("llama", peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "start")
    runs = []
    with zoo.hosted("llama") as ours:
        for rate in (5e-3, 1e-2):
            _start(ours, tmp_path / "start")
            trainer = _trainer(ours, Examples(zoo, "llama"), tmp_path, learning_rate=rate, max_steps=8)
            trainer.train()
            runs.append(torch.tensor(_losses(trainer)))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


def test_dropout_has_the_same_distribution(zoo: Any, tmp_path: Path) -> None:
    theirs = zoo.peft("llama", peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.3, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path)
    batch = zoo.batch("llama", 1, 4)
    times = 400
    moments = []
    torch.manual_seed(0)
    with zoo.hosted("llama") as ours:
        _start(ours, tmp_path)
        for model in (ours, theirs):
            model.train()
            drawn = torch.stack([zoo.logits(model, batch) for _ in range(times)])
            moments.append((drawn.mean(0), drawn.var(0)))
        zoo.same(ours.eval(), theirs.eval(), "llama")
    (mean, variance), (wanted, wanted_variance) = moments
    assert variance.min() > 0.0
    # Of standard scores, a mean square of 1 is expected; of a thousand, none beyond 6.
    scores = (mean - wanted) / ((variance + wanted_variance) / times).sqrt()
    assert scores.abs().max() < 6
    assert 0.3 < scores.square().mean() < 3
    torch.testing.assert_close(variance.mean(), wanted_variance.mean(), rtol=0.1, atol=0)


def test_dropout_draws_anew_and_repeats_with_its_seed(zoo: Any) -> None:
    with zoo.hosted("llama") as ours:
        ours.add_adapter("adapter a = lora(rank = 4, dropout = 0.5) { on q_proj, v_proj }")
        zoo.randomise(ours)
        ours.train()
        batch = zoo.batch("llama")
        torch.manual_seed(1)
        first, second = zoo.logits(ours, batch), zoo.logits(ours, batch)
        torch.manual_seed(1)
        assert torch.equal(zoo.logits(ours, batch), first)
        assert not torch.equal(first, second)


@pytest.fixture
def started(zoo: Any, tmp_path: Path) -> Any:
    """Gives the shared model with its adapter as it was at the start."""
    theirs = zoo.peft("llama", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    theirs.save_pretrained(tmp_path / "begin")
    with zoo.hosted("llama") as ours:
        yield lambda: _start(ours, tmp_path / "begin")


def _bank(model: Any) -> Mapping[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if "adapter_bank" in name}


def test_resume(started: Any, zoo: Any, tmp_path: Path) -> None:
    examples = Examples(zoo, "llama")
    options = dict(max_steps=8, save_strategy="steps", save_steps=4)
    whole = _trainer(started(), examples, tmp_path, **options)
    whole.train()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        each.name for each in (tmp_path / "checkpoint-4").iterdir()
    }
    wanted, reached = _bank(whole.model), zoo.logits(whole.model.eval(), zoo.batch("llama"))
    resumed = _trainer(started(), examples, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert _losses(resumed)[-4:] == _losses(whole)[-4:]
    assert all(torch.equal(each, wanted[name]) for name, each in _bank(resumed.model).items())
    theirs = zoo.reference("llama", tmp_path / "checkpoint-8")
    torch.testing.assert_close(zoo.logits(theirs, zoo.batch("llama")), reached, atol=1e-5, rtol=1e-5)


def test_resume_with_several_adapters(started: Any, zoo: Any, tmp_path: Path) -> None:
    """All of them come back, the one at rest as well, and the base is not written."""
    ours = started()
    ours.add_adapter("adapter rest = lora(rank = 2) { on o_proj }")
    zoo.randomise(ours)
    ours.set_adapter("start")
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    _trainer(ours, Examples(zoo, "llama"), tmp_path, **options).train()
    wanted = _bank(ours)
    assert {"start", "rest"} < {each.name for each in (tmp_path / "checkpoint-2").iterdir()}
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists(), "PEFT would take nothing else"
    with torch.no_grad():
        for each in ours.parameters():
            if each.requires_grad:
                each.zero_()
    _trainer(ours, Examples(zoo, "llama"), tmp_path, **options).train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(each, wanted[name]) for name, each in _bank(ours).items())


def test_best_model_is_loaded_at_the_end(started: Any, zoo: Any, tmp_path: Path) -> None:
    trainer = _trainer(
        started(),
        Examples(zoo, "llama"),
        tmp_path,
        max_steps=6,
        learning_rate=0.5,  # so high that it gets worse
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(best / "adapter_model.safetensors")
    now = trainer.model.adapter_state_dict("start")
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[key], now[key]) for key in saved)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)


def test_evaluate_predict_and_save(started: Any, zoo: Any, tmp_path: Path) -> None:
    ours = started()
    examples = Examples(zoo, "llama", 6)
    ours.save_pretrained(tmp_path / "now")
    theirs = zoo.reference("llama", tmp_path / "now")
    results = []
    for model in (ours, theirs):
        trainer = _trainer(model, examples, tmp_path, label_names=["labels"])
        results.append((trainer.evaluate()["eval_loss"], trainer.predict(examples).predictions))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for got, wanted in zip(_flat(results[0][1]), _flat(results[1][1]), strict=True):
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)
    _trainer(ours, examples, tmp_path).save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()
    zoo.same(zoo.reference("llama", tmp_path / "final"), ours.eval(), "llama")


def _flat(predictions: Any) -> list[Any]:
    if not isinstance(predictions, tuple):
        return [predictions]
    return [leaf for each in predictions for leaf in _flat(each)]


def test_gradient_checkpointing(started: Any, zoo: Any, tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        trainer = _trainer(
            started(), Examples(zoo, "llama"), tmp_path, max_steps=3, activation_checkpointing=checkpointing
        )
        trainer.train()
        assert trainer.model.is_gradient_checkpointing is checkpointing
        trainer.model.gradient_checkpointing_disable()
        runs.append(_losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
