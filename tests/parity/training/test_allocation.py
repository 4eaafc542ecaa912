"""A budget of ranks dealt out while training: PEFT's masks at every step, its losses, its files."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from peftc import compiler
from tests.matrix import wide

STEPS = 16
TRAINED = 5e-5  # two trainings by Adam, which makes steps of one size out of gradients of any, rounded differently
SCHEDULE = dict(init_r=5, target_r=2, total_step=STEPS, tinit=2, tfinal=4, deltaT=2, beta1=0.8, beta2=0.7)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
OPTIMISERS = {"sgd": dict(lr=0.5), "adamw": dict(lr=2e-2, weight_decay=0.1)}


def _config(name: str, **more: Any) -> peft.AdaLoraConfig:
    fields = {**SCHEDULE, "target_modules": TARGETS[name], "orth_reg_weight": 0.3, **more}
    return peft.AdaLoraConfig(task_type=TASKS[name], fan_in_fan_out=name == "gpt2", **fields)


@pytest.fixture
def load(zoo: Any) -> Iterator[Callable[..., Any]]:
    """Loads a checkpoint into the session's adapted model, which keeps its traces, in place of the one before."""
    hosts: dict[str, Any] = {}

    def loaded(name: str, directory: Path, *, is_trainable: bool = False) -> Any:
        host = hosts[name] = zoo.host(name)
        _clear(host)
        host.load_adapter(directory, is_trainable=is_trainable)
        host.set_adapter("default", inference_mode=not is_trainable)
        return host.train(is_trainable)

    yield loaded
    for host in hosts.values():
        _clear(host)


def _clear(host: Any) -> None:
    if host._adapter_state.displaced:
        host.unmerge_adapter()
    host.delete_adapter(list(host._adapter_state.names()))
    host.eval().zero_grad()


Load = Callable[..., Any]


def _pair(zoo: Any, load: Load, name: str, directory: Path, **more: Any) -> tuple[Any, Any]:
    """Our model and PEFT's, with the same adapter to train."""
    zoo.peft(name, _config(name, **more)).save_pretrained(directory / "start")
    theirs = zoo.reference(name, directory / "start", is_trainable=True).train()
    return load(name, directory / "start", is_trainable=True), theirs


def _optimiser(model: Any, kind: str) -> torch.optim.Optimizer:
    parameters = [each for each in model.parameters() if each.requires_grad]
    return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](parameters, **OPTIMISERS[kind])


def _batch(zoo: Any, name: str, step: int) -> dict[str, torch.Tensor]:
    batch = zoo.batch(name, 3, 8, seed=step % 3)
    return {**batch, "labels": zoo.labels(name, 3, 8)}


def _theirs(model: Any) -> dict[str, list[bool]]:
    pattern = model.peft_config["default"].rank_pattern or {}
    return {name.removesuffix(".default"): mask for name, mask in pattern.items()}


def _run(zoo: Any, name: str, model: Any, kind: str, steps: Sequence[int] = range(STEPS)) -> list[Any]:
    """The loss and the masks of every step."""
    optimiser, trace = _optimiser(model, kind), []
    is_ours = hasattr(model, "rank_pattern")
    for step in steps:
        loss = model(**_batch(zoo, name, step)).loss
        loss.backward()
        optimiser.step()
        (model if is_ours else model.base_model).update_and_allocate(step)
        optimiser.zero_grad()
        trace.append((loss.item(), model.rank_pattern("default") if is_ours else _theirs(model)))
    return trace


def _kept(masks: Mapping[str, Sequence[bool]]) -> int:
    return sum(map(sum, masks.values()))


MASKED = [("llama", "sgd"), ("llama", "adamw"), ("gpt2", "adamw"), ("bert", "adamw")]


@pytest.mark.parametrize(("name", "kind"), wide(MASKED, ("llama", "bert")))
def test_masks_and_losses(name: str, kind: str, zoo: Any, load: Load, tmp_path: Path) -> None:
    ours, theirs = _pair(zoo, load, name, tmp_path)
    got, wanted = _run(zoo, name, ours, kind), _run(zoo, name, theirs, kind)
    for step, ((loss, masks), (their_loss, their_masks)) in enumerate(zip(got, wanted, strict=True)):
        assert masks == their_masks, step
        assert loss == pytest.approx(their_loss, abs=2e-5), step
    kept = [_kept(masks) for _, masks in got]
    sites = len(got[-1][1])
    assert kept[:3] == [0, 0, 0]
    assert sorted(kept[4:], reverse=True) == kept[4:]
    assert kept[-1] == sites * SCHEDULE["target_r"] < kept[4]
    zoo.same(ours.eval(), theirs.eval(), name, base=zoo.model(name), near=TRAINED)


def test_files_both_ways(zoo: Any, load: Load, tmp_path: Path) -> None:
    ours, theirs = _pair(zoo, load, "llama", tmp_path)
    for model in (ours, theirs):
        _run(zoo, "llama", model, "adamw")
        model.eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("ours", "theirs")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"] != {}
    for field in (*SCHEDULE, "orth_reg_weight", "lora_alpha"):
        assert configs[0][field] == configs[1][field], field
    with_tensors = peft.get_peft_model_state_dict(theirs)
    assert {key: each.shape for key, each in ours.get_adapter_state_dict().items()} == {
        key: each.shape for key, each in with_tensors.items()
    }
    zoo.same(theirs, ours, "llama", base=zoo.model("llama"), near=TRAINED)
    for directory in (tmp_path / "ours", tmp_path / "theirs"):
        loaded = load("llama", directory)
        zoo.same(zoo.reference("llama", directory), loaded, "llama", base=zoo.model("llama"))
        zoo.same(loaded, theirs, "llama", near=TRAINED)
        assert loaded.rank_pattern("default") == configs[1]["rank_pattern"]
        loaded.save_pretrained(tmp_path / "again")
        zoo.same(zoo.reference("llama", tmp_path / "again"), theirs, "llama", near=TRAINED)
        loaded.merge_adapter()
        zoo.same(loaded, theirs, "llama", near=TRAINED)


def test_a_site_that_loses_every_rank(zoo: Any, load: Load, tmp_path: Path) -> None:
    config = _config("llama", init_r=4, target_r=1, target_modules=["q_proj", "v_proj"])
    theirs = zoo.peft("llama", config)
    masks = [[False] * 4, [True] * 4, [True, False, False, True], [False, True, False, False]]
    vectors = {name: each for name, each in theirs.base_model.model.named_parameters() if "lora_E" in name}
    config.rank_pattern = dict(zip(vectors, masks, strict=True))
    with torch.no_grad():
        for name, vector in vectors.items():
            vector[~torch.tensor(config.rank_pattern[name])] = 0
    theirs.peft_config["default"].rank_pattern = config.rank_pattern
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load("llama", tmp_path / "theirs")
    zoo.same(ours, theirs, "llama", base=zoo.model("llama"))
    ours.save_pretrained(tmp_path / "ours")
    zoo.same(zoo.reference("llama", tmp_path / "ours"), theirs, "llama")


def test_training_goes_on_from_a_pruned_file(zoo: Any, load: Load, tmp_path: Path) -> None:
    trained, theirs = _pair(zoo, load, "llama", tmp_path)
    for model in (trained, theirs):
        _run(zoo, "llama", model, "adamw")
    theirs.save_pretrained(tmp_path / "theirs")
    again = load("llama", tmp_path / "theirs", is_trainable=True)
    their_again = zoo.reference("llama", tmp_path / "theirs", is_trainable=True).train()
    assert again.regularization_loss().item() > 0.01
    batch = _batch(zoo, "llama", 0)
    losses = [each(**batch).loss for each in (again, their_again)]
    # What the file left out is in no term: neither in the output nor in the regulariser.
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=2e-5)
    before = again.rank_pattern("default")
    got = _run(zoo, "llama", again, "adamw", range(STEPS, STEPS + 3))
    assert all(masks == before for _, masks in got)
    again.save_pretrained(tmp_path / "ours")
    zoo.same(zoo.reference("llama", tmp_path / "ours"), again.eval(), "llama")


def test_the_regulariser_is_in_the_loss_of_training_alone(zoo: Any, load: Load, tmp_path: Path) -> None:
    zoo.peft("llama", _config("llama")).save_pretrained(tmp_path)
    ours = load("llama", tmp_path, is_trainable=True)
    batch = _batch(zoo, "llama", 0)
    evaluated, trained = ours.eval()(**batch).loss, ours.train()(**batch).loss
    added = ours.regularization_loss()
    assert added.item() > 0.1
    assert (trained - evaluated).item() == pytest.approx(added.item(), abs=1e-5)
    ours.set_adapter("default", inference_mode=True)
    assert ours(**batch).loss.item() == pytest.approx(evaluated.item(), abs=1e-5)
    ours.set_adapter("default")
    ours.disable_adapters()
    assert (ours(**batch).loss - zoo.model("llama")(**batch).loss).abs() < 1e-5
    ours.enable_adapters()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    assert compiled(**batch).loss.item() == pytest.approx(trained.item(), abs=1e-5)


# --- the Trainer ---


class Examples(torch.utils.data.Dataset):
    """Rows of random tokens with labels."""

    def __init__(self, zoo: Any, name: str, count: int = 24):
        self._columns = {**zoo.batch(name, count, 8, seed=77), "labels": zoo.labels(name, count, 8)}
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


class Theirs(hf.TrainerCallback):
    """What PEFT asks its users to write."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


class Watch(hf.TrainerCallback):
    """Remembers the masks of every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, list[bool]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(model.rank_pattern("default") if hasattr(model, "rank_pattern") else _theirs(model))


def _trainer(model: Any, zoo: Any, directory: Path, *callbacks: hf.TrainerCallback, **options: Any) -> hf.Trainer:
    defaults: dict[str, Any] = dict(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
        dataloader_pin_memory=False,
    )
    arguments = hf.TrainingArguments(**{**defaults, **options})
    return hf.Trainer(model, arguments, train_dataset=Examples(zoo, "llama"), callbacks=list(callbacks))


def _losses(trainer: hf.Trainer) -> torch.Tensor:
    return torch.tensor([each["loss"] for each in trainer.state.log_history if "loss" in each])


def test_trainer(zoo: Any, load: Load, tmp_path: Path) -> None:
    ours, theirs = _pair(zoo, load, "llama", tmp_path)
    watches = (Watch(), Watch())
    # Ours last: the watch sees what PEFT's users see, whose masks are made before a step ends.
    trainers = (
        _trainer(ours, zoo, tmp_path / "run", compiler.RankAllocation(), watches[0]),
        _trainer(theirs, zoo, tmp_path / "run", Theirs(), watches[1]),
    )
    for trainer in trainers:
        trainer.train()
    torch.testing.assert_close(_losses(trainers[0]), _losses(trainers[1]), atol=1e-4, rtol=0)
    assert watches[0].seen == watches[1].seen
    assert _kept(watches[0].seen[-1]) == len(watches[0].seen[-1]) * SCHEDULE["target_r"]


def test_without_final_steps_the_budget_is_kept_all_the_same(zoo: Any, load: Load, tmp_path: Path) -> None:
    ours, _ = _pair(zoo, load, "llama", tmp_path, tfinal=0, deltaT=3, total_step=8)
    _trainer(ours, zoo, tmp_path / "run", compiler.RankAllocation(), max_steps=8).train()
    masks = ours.rank_pattern("default")
    assert _kept(masks) == len(masks) * SCHEDULE["target_r"]
    ours.save_pretrained(tmp_path / "ours")
    zoo.same(zoo.reference("llama", tmp_path / "ours"), ours.eval(), "llama", base=zoo.model("llama"))


def test_a_resumed_run_is_the_run_that_was_not_stopped(zoo: Any, load: Load, tmp_path: Path) -> None:
    whole, _ = _pair(zoo, load, "llama", tmp_path)
    options = dict(save_strategy="steps", save_steps=7)
    _trainer(whole, zoo, tmp_path / "run", compiler.RankAllocation(), **options).train()
    masks, tensors = whole.rank_pattern("default"), {k: v.clone() for k, v in whole.get_adapter_state_dict().items()}
    again = load("llama", tmp_path / "start", is_trainable=True)
    assert again.rank_pattern("default") == {}
    resumed = _trainer(again, zoo, tmp_path / "run", compiler.RankAllocation())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    assert again.rank_pattern("default") == masks != {}
    for name, tensor in tensors.items():
        torch.testing.assert_close(again.get_adapter_state_dict()[name], tensor, atol=1e-6, rtol=0)


# --- refusals ---


def test_no_adapter_keeps_a_budget(zoo: Any, load: Load, tmp_path: Path) -> None:
    plain = compiler.apply(zoo.model("llama"), "adapter a = lora(rank = 2) { on q_proj }")
    with pytest.raises(compiler.UsageError, match=r"E546.*keeps a budget"):
        plain.update_and_allocate(0)
    with pytest.raises(compiler.UsageError, match=r"E546.*keeps a budget"):
        _trainer(plain, zoo, tmp_path, compiler.RankAllocation()).train()
    with pytest.raises(compiler.UsageError, match=r"E546.*not an adapted model"):
        _trainer(zoo.peft("llama", _config("llama")), zoo, tmp_path, compiler.RankAllocation()).train()
    assert plain.rank_pattern("a") == {}
    assert plain.regularization_loss().item() == 0
    zoo.peft("llama", _config("llama")).save_pretrained(tmp_path)
    with pytest.raises(compiler.UsageError, match="E546"):
        compiler.load(zoo.model("llama"), tmp_path).update_and_allocate(0)


def test_a_budget_that_cannot_be(zoo: Any) -> None:
    for given, told in {
        "rank = 4, target = 5, steps = 9": "a target of 5 does not fit",
        "rank = 4, target = 2": "steps > 0",
        "rank = 4, target = 2, steps = 9, warmup = 5, final = 4": "leave none to lower the budget in",
        "rank = 4, target = 2, steps = 9, beta1 = 1": "must lie between 0 and 1",
        "rank = 4, target = 2, steps = 9, orthogonal = -1": "rewards what it is to prevent",
    }.items():
        with pytest.raises(compiler.SpecError, match=told):
            compiler.apply(zoo.model("llama"), f"adapter a = adalora({given}) {{ on q_proj }}")


def test_a_call_at_the_wrong_moment(zoo: Any) -> None:
    spec = "adapter a = adalora(rank = 4, target = 2, steps = 9) { on q_proj }"
    ours = compiler.apply(zoo.model("llama"), spec).train()
    with pytest.raises(compiler.UsageError, match=r"E548.*no gradient"):
        ours.update_and_allocate(0)
    ours.merge_adapter()
    with pytest.raises(compiler.UsageError, match=r"E549.*merged"):
        ours.update_and_allocate(0)


def test_a_schedule_that_is_not_the_trainings_is_told(zoo: Any, tmp_path: Path) -> None:
    spec = "adapter a = adalora(rank = 4, target = 2, steps = 9) { on q_proj }"
    ours = compiler.apply(zoo.model("llama"), spec)
    arguments, control = hf.TrainingArguments(str(tmp_path), use_cpu=True), hf.TrainerControl()
    with pytest.warns(UserWarning, match="falls over 9 steps, and training has 2"):
        compiler.RankAllocation().on_train_begin(arguments, hf.TrainerState(max_steps=2), control, model=ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler.RankAllocation().on_train_begin(arguments, hf.TrainerState(max_steps=9), control, model=ours)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda masks: {"model.layers.9.x.lora_E": [True] * 5}, "no vector of the adapter"),
        (lambda masks: {name: mask[1:] for name, mask in masks.items()}, "has 4 entries, expected 5"),
        (lambda masks: {name: [True, False, False, False, True] for name in masks}, "holds 3 entries"),
        (lambda masks: dict.fromkeys(masks, 3), "not a list of true and false"),
    ],
)
def test_masks_that_do_not_fit_the_file(change: Any, told: str, zoo: Any, load: Load, tmp_path: Path) -> None:
    theirs = zoo.peft("llama", _config("llama"))
    names = [name for name, _ in theirs.base_model.model.named_parameters() if name.endswith(".lora_E.default")]
    pattern = {name: [True, True, False, True, False] for name in names}
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    compiler.load(zoo.model("llama"), tmp_path)
    path.write_text(json.dumps({**config, "rank_pattern": change(config["rank_pattern"])}))
    with pytest.raises(compiler.CheckpointError, match=told):
        compiler.load(zoo.model("llama"), tmp_path)
