"""The value of a prompt that is computed: what a file has of it, and the plan for a file that has no more."""

import pytest
import torch
from torch.testing import assert_close

from peftc.grammar.algebra import algebra
from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.expression.scene import Eager
from peftc.passes.plan.resolve import resolve, survey
from peftc.runtime.peft_format.saved_value import VALUE, settled, settled_value, value_key

KEY = "prompt_embeddings"
NETWORK = "adapter a = ptuning(length = 3, hidden = 5, submodules = 2)"
CHANGED = "adapter a = cpt(ids = [4, 2, 7], types = [1, 2, 4])"


@pytest.fixture(scope="module")
def model():
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(9, 8)
    model.get_input_embeddings = lambda: model.embed
    return model


@pytest.fixture
def planned(model):
    return lambda spec: resolve(read_spec(spec).adapters[0], survey(model))


def tensors_of(at):
    generator = torch.Generator().manual_seed(5)
    return {each.role: torch.randn(each.shape, generator=generator) for each in at.bound.params}


def network(tensors):
    e, a, bias_a, b, bias_b, c, bias_c = (tensors[role] for role in "EAaBdCc")
    return torch.relu(torch.relu(e @ a.T + bias_a) @ b.T + bias_b) @ c.T + bias_c


def test_the_value_is_that_of_the_network(planned):
    (at,) = planned(NETWORK).sites
    tensors = {role: each.requires_grad_() for role, each in tensors_of(at).items()}
    value = settled_value(at, tensors, {}.get)
    assert value.shape == at.bound.settled[1] == (6, 8), "of both stacks, though the prompt is of one"
    assert not value.requires_grad
    assert_close(value, network(tensors).detach())
    tensors["c"] = tensors["c"] + 1
    assert_close(settled_value(at, tensors, {}.get), value + 1)


def test_the_value_may_be_over_the_embeddings(planned, model):
    """In float32 whatever type these are of."""
    plan = planned(
        """method m(length: int = 2) {
            on prompt
            param G[length, in] = zeros saved "G"
            let H = G @ W.T saved "H"
            prompt' = H
        } adapter a = m"""
    )
    (at,) = plan.sites
    given, weight = torch.randn(2, 9), model.embed.weight.bfloat16()
    value = settled_value(at, {"G": given}, {"embed.weight": weight}.get)
    assert_close(value, given @ weight.float())


def test_a_file_of_the_value_alone(planned):
    plan = planned(NETWORK)
    (at,) = settled(plan, {KEY}).sites
    (param,) = at.bound.params
    assert (param.role, param.shape, param.saved, param.trained) == (VALUE, (6, 8), KEY, True)
    assert (at.bound.settled, at.bound.drafts) == (None, ())
    value = torch.randn(6, 8)
    assert_close(Evaluator(Eager(), {VALUE: value}, {}).of(at.bound.prompt), value[:3])
    assert at.site == plan.sites[0].site


def test_the_prompt_is_the_same_either_way(planned):
    plan = planned(NETWORK)
    (computed,), (at,) = plan.sites, settled(plan, {KEY}).sites
    tensors = tensors_of(computed)
    value = settled_value(computed, tensors, {}.get)
    found = Evaluator(Eager(), {VALUE: value}, {}).of(at.bound.prompt)
    assert_close(found, Evaluator(Eager(), tensors, {}).of(computed.bound.prompt))
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("keys", [set(), {"other"}, {KEY, "encoder.embedding"}, {"encoder.0.bias"}])
def test_a_file_that_has_more_or_less_leaves_the_plan(keys, planned):
    plan = planned(NETWORK)
    assert settled(plan, keys) == plan


@pytest.mark.parametrize(
    "spec",
    ["adapter a = prompt(length = 3)", "adapter a = multitask_prompt(tasks = 2)", "adapter a = lora { on embed }"],
)
def test_what_is_no_computed_prompt_is_left(spec, planned):
    plan = planned(spec)
    assert settled(plan, {KEY}) == plan


def test_what_the_labels_read_is_kept(planned):
    (at,) = settled(planned(CHANGED), {KEY}).sites
    assert [each.role for each in at.bound.params] == [VALUE, "I", "T"]
    assert at.bound.prompt == algebra.Param(VALUE)
    given = {VALUE: torch.zeros(3, 8), "I": torch.tensor([4, 2, 7]), "T": torch.tensor([[1], [2], [4]])}
    labels = Evaluator(Eager(), given, {}).of(at.bound.labels)
    assert labels.tolist() == [-100, -100, 7]


def test_the_key_of_a_value_is_no_tensors(planned):
    (at,) = planned(NETWORK).sites
    key = value_key("a", at)
    assert (key.adapter, key.site, key.role) == ("a", "@prompt", VALUE)
    assert key not in {at.key("a", each) for each in at.bound.params}
