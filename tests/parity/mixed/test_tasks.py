"""Rows of one batch that have tasks of their own: peft's Poly, over regions."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import SpecError, UsageError
from tests import zoo

TASKS = torch.tensor([0, 2, 1, 0])
MODELS = {
    "llama": (["q_proj", "down_proj"], "CAUSAL_LM"),
    "t5": (["q", "v", "wo"], "SEQ_2_SEQ_LM"),
    "bert": (["query", "value"], "SEQ_CLS"),
}
SPEC = "adapter a = poly(rank = 4, tasks = 3, skills = 2) { on q_proj, down_proj }"

everywhere = pytest.mark.parametrize("name", MODELS)
split = pytest.mark.parametrize("splits", [1, 2])
pytestmark = pytest.mark.filterwarnings("ignore")


def config(name: str, **more: Any) -> peft.PolyConfig:
    targets, kind = MODELS[name]
    given: dict[str, Any] = {"r": 4, "n_tasks": 3, "n_skills": 2, "target_modules": targets, "task_type": kind, **more}
    return peft.PolyConfig(**given)


def inputs(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids[:, :5]} if name == "t5" else {})}


def labels(name: str) -> dict[str, torch.Tensor]:
    given = inputs(name)
    if name == "bert":
        return given | {"labels": torch.tensor([0, 1, 1, 0])}
    ids = given.pop("decoder_input_ids", given["input_ids"])
    return given | {"labels": ids.contiguous()}


def theirs(model: Any, name: str, std: float = 0.3, **more: Any) -> Any:
    """Peft's, its tensors away from where they start."""
    made = peft.get_peft_model(copy.deepcopy(model), config(name, **more))
    moved(made, std)
    return made.eval()


def moved(model: Any, std: float) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for key, each in model.named_parameters():
            if "poly_" in key or "adapter_bank" in key:
                each.add_(torch.randn_like(each) * std)


@torch.no_grad()
@everywhere
@split
def test_checkpoints_both_ways(name: str, splits: int, tmp_path: Path) -> None:
    model, given = zoo.make(name), inputs(name)
    wrapped = theirs(model, name, std=2.0 if name == "bert" else 0.6, n_splits=splits)
    wrapped.save_pretrained(tmp_path / "theirs")
    expected = wrapped(**given, task_ids=TASKS).logits
    adapted = compiler.load(model, tmp_path / "theirs").eval()
    assert_close(adapted(**given, task_ids=TASKS).logits, expected, rtol=0, atol=1e-5)
    assert (wrapped(**given, task_ids=TASKS.roll(1)).logits - expected).abs().max() > 1e-3

    moved(adapted, 0.1)
    ours = adapted(**given, task_ids=TASKS).logits
    assert (ours - expected).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_close(back(**given, task_ids=TASKS).logits, ours, rtol=0, atol=1e-5)


@torch.no_grad()
@everywhere
def test_a_row_alone(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    given = {key: value[2:3] for key, value in inputs(name).items()}
    wrapped = theirs(model, name, std=0.6)
    wrapped.save_pretrained(tmp_path)
    adapted = compiler.load(model, tmp_path).eval()
    found = [adapted(**given, task_ids=torch.tensor([task])).logits for task in range(3)]
    for task, each in enumerate(found):
        assert_close(each, wrapped(**given, task_ids=torch.tensor([task])).logits, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4
    together = {key: value.expand(3, -1) for key, value in given.items()}
    assert_close(torch.cat(found), adapted(**together, task_ids=[0, 1, 2]).logits, rtol=0, atol=1e-5)


@everywhere
@pytest.mark.parametrize("init_weights", [True, False])
def test_a_seed_gives_pefts_start(name: str, init_weights: bool) -> None:
    model, made = zoo.make(name), config(name, n_splits=2, init_weights=init_weights)
    torch.manual_seed(0)
    expected = peft.get_peft_model_state_dict(peft.get_peft_model(copy.deepcopy(model), made))
    torch.manual_seed(0)
    found = compiler.apply(model, made).adapter_state_dict("default")
    assert set(found) >= {key for key in expected if "poly_" in key}
    for key in found:
        assert_close(found[key], expected[key])
    assert any(float(each.detach().std()) > 1e-4 for each in found.values())


@torch.no_grad()
def test_an_adapter_starts_as_the_base() -> None:
    model, given = zoo.make("llama"), inputs("llama")
    adapted = compiler.apply(model, SPEC).eval()
    assert torch.equal(adapted(**given, task_ids=TASKS).logits, model(**given).logits)


def losses(model: Any, given: dict[str, torch.Tensor]) -> list[float]:
    trained = [each for each in model.parameters() if each.requires_grad]
    optimiser, found = torch.optim.AdamW(trained, lr=3e-2), []
    torch.manual_seed(11)
    for step in range(20):
        loss = model(**given, task_ids=TASKS.roll(step)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(float(loss))
    return found


@pytest.mark.parametrize(
    ("name", "splits", "dropout", "checkpointing"),
    [("llama", 1, 0.0, False), ("llama", 2, 0.0, True), ("t5", 2, 0.0, False), ("t5", 1, 0.1, False)],
)
def test_twenty_steps_are_pefts(name: str, splits: int, dropout: float, checkpointing: bool, tmp_path: Path) -> None:
    """What is drawn for the rows included, in its turn: with dropout, too, which draws from the same generator."""
    model = zoo.make(name, **({"dropout_rate": dropout} if name == "t5" else {}))
    wrapped, given = theirs(model, name, n_splits=splits), labels(name)
    wrapped.save_pretrained(tmp_path)
    adapted = compiler.load(model, tmp_path, is_trainable=True)
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    expected = losses(wrapped.train(), given)
    assert expected[-1] < expected[0] - 0.05
    assert len(set(expected)) == 20
    assert_close(losses(adapted.train(), given), expected, rtol=0, atol=1e-4)


def test_rows_are_drawn_for_one_by_one() -> None:
    """Rows that are alike, with one task, differ in training, and do not in evaluation."""
    adapted = zoo.noisy(compiler.apply(zoo.make("llama"), SPEC), std=0.5)
    ids = torch.tensor([[1, 5, 9]] * 3)
    with torch.no_grad():
        drawn = adapted.train()(input_ids=ids, task_ids=[1, 1, 1]).logits
        again = adapted(input_ids=ids, task_ids=[1, 1, 1]).logits
        still = adapted.eval()(input_ids=ids, task_ids=[1, 1, 1]).logits
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    assert (drawn - again).abs().max() > 1e-3
    assert_close(still[0], still[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_keeps_the_tasks(name: str, more: dict[str, int], tmp_path: Path) -> None:
    model = zoo.make(name)
    wrapped = theirs(model, name, std=1.0)
    wrapped.save_pretrained(tmp_path)
    adapted = compiler.load(model, tmp_path).eval()
    given = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
    found = adapted.generate(**given, task_ids=TASKS, max_new_tokens=8, **more)
    assert not torch.equal(found, adapted.generate(**given, task_ids=TASKS.roll(1), max_new_tokens=8, **more))
    if more:  # peft has one task for each row of the call, and not for each beam
        rows = [
            adapted.generate(
                **{key: value[row : row + 1] for key, value in given.items()},
                task_ids=TASKS[row : row + 1],
                max_new_tokens=8,
                **more,
            )
            for row in range(len(TASKS))
        ]
        for row, each in enumerate(rows):
            assert torch.equal(found[row, : each.shape[1]], each[0])
        return
    assert torch.equal(found, wrapped.generate(**given, task_ids=TASKS, max_new_tokens=8))


@torch.no_grad()
def test_two_at_once(tmp_path: Path) -> None:
    model, given = zoo.make("llama"), inputs("llama")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config("llama"))
    wrapped.add_adapter("other", config("llama", n_splits=2, r=2, target_modules=["q_proj", "v_proj"]))
    moved(wrapped, 0.6)
    wrapped.save_pretrained(tmp_path)
    wrapped.eval().base_model.set_adapter(["default", "other"])
    adapted = compiler.load(model, tmp_path).eval()
    adapted.load_adapter(tmp_path / "other", "other")
    alone = adapted(**given, task_ids=TASKS).logits
    adapted.set_adapter(["default", "other"])
    found = adapted(**given, task_ids=TASKS).logits
    assert_close(found, wrapped(**given, task_ids=TASKS).logits, rtol=0, atol=1e-5)
    assert (found - alone).abs().max() > 1e-3


@torch.no_grad()
def test_names_and_tasks_together() -> None:
    model, given = zoo.make("llama"), inputs("llama")
    adapted = compiler.apply(model, f"{SPEC} adapter low = lora(rank = 2) {{ on q_proj }}").eval()
    adapted.add_adapter("adapter b = poly(rank = 2, tasks = 5, splits = 2) { on q_proj, v_proj }")
    zoo.noisy(adapted, std=0.4)
    names = ["a", ("low", "b"), "__base__", "low"]
    mixed = adapted(**given, adapter_names=names, task_ids=[2, 4, -1, 9]).logits
    assert_close(mixed[2], model(**given).logits[2], rtol=0, atol=1e-5)
    alone = {0: ("a", {"task_ids": [2]}), 1: (["low", "b"], {"task_ids": [4]}), 3: ("low", {})}
    for row, (active, task) in alone.items():
        adapted.set_adapter(active)
        assert_close(mixed[row], adapted(**given, **task).logits[row], rtol=0, atol=1e-5)
    adapted.set_adapter(["low", "b"])
    assert (mixed[1] - adapted(**given, task_ids=[3]).logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_compiled_program_takes_other_tasks() -> None:
    adapted = zoo.noisy(compiler.apply(zoo.make("llama"), SPEC).eval(), std=0.4)
    given = inputs("llama")
    expected = [adapted(**given, task_ids=TASKS.roll(each)).logits for each in range(3)]
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    compiled(**given, task_ids=TASKS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for each, wanted in enumerate(expected):
            assert_close(compiled(**given, task_ids=TASKS.roll(each)).logits, wanted, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
@torch.no_grad()
def test_regions(regions: Any) -> None:
    model, given = zoo.make("llama"), inputs("llama")
    torch.manual_seed(2)
    found = zoo.noisy(compiler.apply(model, SPEC, regions=regions).eval(), std=0.4)
    torch.manual_seed(2)
    wanted = zoo.noisy(compiler.apply(model, SPEC).eval(), std=0.4)
    logits = found(**given, task_ids=TASKS).logits
    assert_close(logits, wanted(**given, task_ids=TASKS).logits, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="E563"):
        found(**given)
    assert torch.equal(found(**given, task_ids=TASKS).logits, logits)


@torch.no_grad()
def test_a_module_by_itself_needs_tasks_too() -> None:
    adapted = compiler.apply(zoo.make("llama"), SPEC).eval()
    with pytest.raises(UsageError, match="E563"):
        adapted.model(input_ids=torch.tensor([[1, 2]]))


@torch.no_grad()
def test_at_rest_tasks_mean_nothing() -> None:
    """As in peft: reference models are called with what the model is called with."""
    model, given = zoo.make("llama"), inputs("llama")
    adapted = zoo.noisy(compiler.apply(model, SPEC).eval())
    with adapted.disable_adapter():
        assert_close(adapted(**given, task_ids=TASKS).logits, model(**given).logits)


REFUSED = {
    "none": (None, "are not given"),
    "out of range": ([0, 3, 1, 1], "there is no task 3: those of a are numbered from 0 to 2"),
    "negative": ([0, -1, 1, 1], "there is no task -1"),
    "too few": ([0, 1], "2 tasks were given for 4 rows"),
    "no number": ([0.5, 1, 2, 0], "a whole number for each row"),
    "a table": ([[0, 1, 2, 0]], "a whole number for each row"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_tasks_that_do_not_fit(case: str) -> None:
    tasks, message = REFUSED[case]
    adapted = compiler.apply(zoo.make("llama"), SPEC).eval()
    with pytest.raises(UsageError, match="E563") as caught:
        adapted(**inputs("llama"), task_ids=tasks)
    assert message in str(caught.value)
    with pytest.raises(UsageError, match="E563"):
        adapted.generate(**inputs("llama"), task_ids=tasks, max_new_tokens=2)


@torch.no_grad()
def test_beside_a_prompt_by_task_it_is_refused() -> None:
    adapted = compiler.apply(zoo.make("llama"), SPEC).eval()
    adapted.add_adapter("adapter p = multitask_prompt(length = 2, tasks = 3)")
    given = inputs("llama")
    adapted.set_adapter("p")
    alone = adapted(**given, task_ids=TASKS).logits
    adapted.set_adapter(["a", "p"])
    with pytest.raises(UsageError, match="E528") as caught:
        adapted(**given, task_ids=TASKS)
    assert "'task_ids' cannot be given: adapter 'p' puts virtual tokens in front" in str(caught.value)
    adapted.set_adapter("p")
    assert torch.equal(adapted(**given, task_ids=TASKS).logits, alone)


def test_what_cannot_be_done_for_all_tasks_at_once() -> None:
    adapted = compiler.apply(zoo.make("llama"), SPEC).eval()
    for merge in (adapted.merge_adapter, adapted.merge_and_unload, adapted.merge_drift):
        with pytest.raises(UsageError, match="E522") as caught:
            merge()
        assert "adapter 'a' has other weights for every task" in str(caught.value)
    assert not adapted._adapter_state.displaced


@pytest.mark.parametrize(
    ("given", "code"),
    [({"n_splits": 5}, "E216"), ({"r": 0}, "E210"), ({"n_tasks": 0}, "E210"), ({"n_skills": 0}, "E210")],
)
def test_sizes_that_do_not_fit(given: dict[str, int], code: str) -> None:
    with pytest.raises(SpecError, match=code):
        compiler.apply(zoo.make("llama"), config("llama", **given))


def test_another_type_of_router_is_refused() -> None:
    with pytest.raises(compiler.AdapterError, match="poly_type"):
        compiler.apply(zoo.make("llama"), config("llama", poly_type="other"))  # peft: "Unsupported poly_type"


def test_conv1d_is_refused() -> None:
    made = peft.PolyConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match="not supported"):
        peft.get_peft_model(zoo.make("gpt2"), made)
    with pytest.raises(SpecError, match="E214"):
        compiler.apply(zoo.make("gpt2"), made)
