"""Embeddings of chosen tokens with a limited change, against PEFT: values, loss, gradients, files, generation."""

import copy
from typing import Any

import peft
import pytest
import torch

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError, SpecError, UsageError

IDS, TYPES = [20, 21, 22, 3, 24, 25, 26, 27, 9], [1, 2, 3, 4, 5, 6, 7, 8, 0]
SPEC = f"adapter a = cpt(ids = {IDS}, types = {TYPES}, epsilon = 0.3, peft_compatible = true)"
PARAMETER = "@prompt.D"


def _config(**fields: Any) -> peft.CPTConfig:
    fields = {"cpt_token_ids": IDS, "cpt_tokens_type_mask": TYPES, "opt_projection_epsilon": 0.3, **fields}
    return peft.CPTConfig(task_type="CAUSAL_LM", **fields)


def _change(size: int) -> torch.Tensor:
    """Some rows within the limit, some beyond it, none where PEFT trains none."""
    change = torch.randn(len(IDS), size, generator=torch.Generator().manual_seed(5)) * 0.1
    change[1] *= 0.01
    change[torch.tensor(TYPES) % 4 == 0] = 0
    return change


def _own(model: Any) -> torch.nn.Parameter:
    (found,) = (each for name, each in model.named_parameters() if name.endswith(f"a.{PARAMETER}"))
    return found


@pytest.fixture(scope="module")
def both(zoo: Any) -> Any:
    theirs = peft.get_peft_model(copy.deepcopy(zoo.model("llama")), _config()).eval()
    with zoo.hosted("llama") as ours:
        ours.add_adapter(SPEC)
        yield ours, theirs


@pytest.fixture
def pair(both: Any) -> Any:
    """Ours and theirs, with the same change. Theirs is shortened by its first call."""
    ours, theirs = both
    ours.set_adapter("a")
    own, their = _own(ours), theirs.prompt_encoder["default"].delta_embedding.weight
    own.data, their.data = _change(own.shape[1]), _change(own.shape[1])
    own.grad = their.grad = None
    yield ours, theirs
    ours.delete_adapter([each for each in ours._adapter_state.names() if each != "a"])


@pytest.mark.parametrize("typed", [False, True])
def test_loss_and_gradients(pair: Any, typed: bool, zoo: Any) -> None:
    ours, theirs = pair
    batch = zoo.batch("llama", 2, 6)
    batch |= {"labels": zoo.labels("llama", 2, 6)}
    batch["labels"][1, 3] = -100
    if typed:
        batch["input_type_mask"] = torch.tensor([[0, 1, 2, 3, 4, 4], [2, 4, 4, 3, 8, 0]])
    given = {name: each.clone() for name, each in batch.items()}
    got, wanted = ours(**batch), theirs(**given)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, wanted.loss, atol=1e-6, rtol=1e-6)
    got.loss.backward()
    wanted.loss.backward()
    grad = theirs.prompt_encoder["default"].delta_embedding.weight.grad
    torch.testing.assert_close(_own(ours).grad, grad, atol=1e-6, rtol=1e-4)
    assert (grad.abs().amax(1) > 1e-4).tolist() == [each % 4 != 0 for each in TYPES]


def test_types_of_tokens_change_the_loss_and_stay_as_they_are(pair: Any, zoo: Any) -> None:
    ours, _ = pair
    batch = {**zoo.batch("llama", 2, 6), "labels": zoo.labels("llama", 2, 6)}
    types = torch.tensor([[1, 2, 3, 4, 4, 4]] * 2)
    before = types.clone()
    assert ours(**batch, input_type_mask=types).loss != ours(**batch).loss
    assert torch.equal(types, before)
    with pytest.raises(UsageError, match="E567"):
        ours(**batch, input_type_mask=types[:, :3])


def test_a_call_without_answers_has_the_loss_of_its_labels(zoo: Any) -> None:
    """Where PEFT counts no label at all: no type is a multiple of four, as where a config says none."""
    config = _config(cpt_token_ids=IDS[:3], cpt_tokens_type_mask=None)
    theirs = peft.get_peft_model(copy.deepcopy(zoo.model("llama")), config).eval()
    ids, labels = zoo.batch("llama", 1, 5)["input_ids"], zoo.labels("llama", 1, 5)
    with zoo.hosted("llama") as ours:
        ours.add_adapter(f"adapter b = cpt(ids = {IDS[:3]}, peft_compatible = true)")
        got = ours(input_ids=ids, labels=labels)
    assert theirs(input_ids=ids, labels=labels).loss.isnan()
    wanted = torch.nn.functional.cross_entropy(got.logits[0, 2:-1], labels[0])
    torch.testing.assert_close(got.loss, wanted)


def test_files_both_ways(pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, theirs = pair
    ids = zoo.batch("llama", 1, 6)["input_ids"]
    labels = zoo.labels("llama", 1, 6)
    wanted = theirs(input_ids=ids, labels=labels)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["a"])
    ours.load_adapter(tmp_path / "theirs", "read")
    ours.set_adapter("read")
    got = ours(input_ids=ids, labels=labels)
    torch.testing.assert_close(got.logits, wanted.logits[:, len(IDS) :], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.loss, wanted.loss)
    ours.save_pretrained(tmp_path / "again", selected_adapters=["read"])
    for place in (tmp_path / "again" / "read", tmp_path / "ours"):
        reference = zoo.reference("llama", place)
        found = reference(input_ids=ids, labels=labels)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.loss, wanted.loss)
        config = reference.peft_config["default"]
        assert (config.cpt_token_ids, config.cpt_tokens_type_mask) == (IDS, TYPES)
        assert config.opt_projection_epsilon == 0.3


def test_our_own_file_is_trained_on(pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, _ = pair
    ours.save_pretrained(tmp_path, selected_adapters=["a"])
    batch = zoo.batch("llama", 1, 6)
    wanted = ours(**batch).logits[:, len(IDS) :]
    ours.load_adapter(tmp_path, "more", is_trainable=True)
    ours.set_adapter("more")
    found = ours(**batch)
    torch.testing.assert_close(found.logits, wanted)
    found.logits.sum().backward()
    (own,) = (each for name, each in ours.named_parameters() if name.endswith(f"more.{PARAMETER}"))
    assert torch.equal(own, _own(ours))
    assert own.grad.abs().max() > 0


def test_generation(pair: Any, zoo: Any) -> None:
    ours, theirs = pair
    ids = zoo.batch("llama", 1, 5)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got, wanted = ours.generate(ids, **options), theirs.generate(input_ids=ids, **options)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, zoo.model("llama").generate(ids, **options))


def test_weights_of_examples_are_refused(zoo: Any) -> None:
    config = _config(opt_weighted_loss_type="decay")
    with pytest.raises(CheckpointError, match=r"'opt_weighted_loss_type' = \"decay\" is not supported"):
        zoo.host("llama").add_adapter(config, "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ids = []", "it needs len(ids) > 0"),
        ("ids = [3, 100000]", "max(ids) < in"),
        ("ids = [-1]", "it needs min(ids) >= 0"),
        ("ids = [1, 2], types = [1]", "takes 2 numbers there, and types has 1"),
        ("ids = [1], types = [-4]", "it needs min(types) >= 0"),
    ],
)
def test_what_does_not_fit(arguments: str, message: str, zoo: Any) -> None:
    with pytest.raises(SpecError) as caught:
        zoo.host("llama").add_adapter(f"adapter other = cpt({arguments})")
    assert caught.value.diagnostics[0].code == "E216"
    assert message in str(caught.value)


def test_the_embeddings_are_those_of_the_module(zoo: Any) -> None:
    """Gemma's are scaled by the module that embeds, and the prompt enters after it."""
    base = zoo.model("gemma3")
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(copy.deepcopy(base), _config()))
    ours = compiler.apply(base, SPEC).adapter_state_dict("a")
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    rows = base.get_input_embeddings().weight[IDS]
    torch.testing.assert_close(ours["prompt_embeddings"], rows * rows.shape[1] ** 0.5)
