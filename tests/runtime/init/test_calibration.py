"""Starts from data: what is measured, of which inputs, and what is refused; the user's model is left as it is."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.plan.resolve import resolve, survey
from peftc.runtime.init.calibration import Moments

MEASURES = """method measures(of: text("covariance", "second moment") = "covariance") {
    on linear, conv1d, embedding
    const C[in, in] = covariance if of == "covariance" else second_moment once
    param A[in, in] = C saved "A"
    param B[out, in] = zeros saved "B"
    W' = W + B @ A
}
"""


class Net(nn.Module):
    """Two layers in a row, one behind dropout, one that is never called, and words."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 4), Conv1D(2, 4), nn.Linear(3, 3)
        self.words = nn.Embedding(5, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        return self.second(torch.tanh(self.drop(self.first(x))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(2, rows, 3) + 50 for rows in (3, 5, 1)]


def measured(model, batches, on="first", **values):
    given = ", ".join(f'{name} = "{value}"' for name, value in values.items())
    adapted = compiler.apply(model, f"{MEASURES} adapter a = measures({given}) {{ on {on} }}", calibration=batches)
    return adapted.adapter_state_dict("a")[f"base_model.model.{on}.A"].detach()


def test_moments_of_parts_are_those_of_the_whole():
    torch.manual_seed(0)
    rows = torch.randn(100, 4) + 1000  # a difference of sums would lose everything
    parts = [Moments.of(each) for each in rows.split([1, 9, 90])]
    for each in parts[1:]:
        parts[0].add(each)
    exact = rows.double()
    assert parts[0].count == 100
    assert_close(parts[0].value("covariance").double(), torch.cov(exact.T, correction=0), rtol=1e-2, atol=1e-3)
    assert_close(parts[0].value("second_moment").double(), exact.T @ exact / 100, rtol=1e-5, atol=0)


def test_the_inputs_of_a_site_are_measured(model, batches):
    rows = torch.cat([each.reshape(-1, 3) for each in batches])
    wanted = torch.cov(rows.T, correction=0)
    assert_close(measured(model, batches), wanted, rtol=1e-3, atol=1e-3)
    assert_close(measured(model, (each for each in batches)), wanted, rtol=1e-3, atol=1e-3)
    assert_close(measured(model, batches, of="second moment"), rows.T @ rows / len(rows), rtol=1e-5, atol=0)


def test_every_way_to_call_the_model_is_a_batch(model, batches):
    wanted = measured(model, batches)
    assert torch.equal(measured(model, [(each,) for each in batches]), wanted)
    assert torch.equal(measured(model, [{"x": each} for each in batches]), wanted)


def test_masked_places_do_not_count(model, batches):
    masks = [torch.ones(each.shape[:-1], dtype=torch.int64) for each in batches]
    masks[0][0, :2] = 0
    masks[2][:] = 0
    given = [{"x": each, "attention_mask": mask} for each, mask in zip(batches, masks, strict=True)]
    rows = torch.cat([each[mask.bool()] for each, mask in zip(batches, masks, strict=True)])
    assert_close(measured(model, given), torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-3)


def test_the_base_runs_in_evaluation_mode_and_the_model_stays_as_it_is(model, batches):
    model.train()
    random = torch.get_rng_state()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    rows = torch.tanh(model.first(torch.cat([each.reshape(-1, 3) for each in batches])))
    wanted = torch.cov(rows.T, correction=0)
    found = measured(model, batches, on="second")
    assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-5)
    assert model.training
    assert model.drop.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random), "nothing was drawn"


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays(model, batches, fails):
    adapted = compiler.apply(model, "adapter a = lora(rank = 2) { on first }")
    given = [*batches, torch.ones(2, 7)] if fails else batches
    spec = f"{MEASURES} adapter b = measures {{ on second }}"
    if fails:
        with pytest.raises(RuntimeError):
            adapted.add_adapter(spec, calibration=given)
        assert adapted.active_adapters() == ["a"]
    else:
        adapted.add_adapter(spec, calibration=given)
    for each in (*model.modules(), *adapted.modules()):
        assert not each._forward_pre_hooks


@torch.no_grad()
def test_the_base_runs_and_not_the_adapters(model, batches):
    adapted = compiler.apply(model.eval(), 'adapter a = lora(rank = 2, init = "random") { on first }')
    adapted.merge_adapter()
    spec = f"{MEASURES} adapter b = measures {{ on second }}"
    with pytest.warns(UserWarning, match="unmerged"):
        adapted.add_adapter(spec, calibration=batches)
    found = adapted.adapter_state_dict("b")["base_model.model.second.A"]
    assert torch.equal(found, measured(model, batches, on="second"))


def test_nothing_of_the_data_stays(model, batches):
    adapted = compiler.apply(model, f"{MEASURES} adapter a = measures {{ on first }}", calibration=batches)
    assert {each.rpartition(".")[2] for each in adapted.adapter_state_dict("a")} == {"A", "B"}
    (at,) = adapted.adapter_plan("a").sites
    assert [each.role for each in at.bound.params] == ["A", "B"]
    assert [each.role for each in at.bound.drafts] == ["C"]


def test_a_file_needs_no_data(model, batches, tmp_path):
    adapted = compiler.apply(model.eval(), f"{MEASURES} adapter a = measures {{ on first }}", calibration=batches)
    adapted.save_pretrained(tmp_path)
    again = compiler.load(model, tmp_path)
    for name, each in again.adapter_state_dict("default").items():
        assert torch.equal(each, adapted.adapter_state_dict("a")[name])


@pytest.mark.parametrize(
    ("on", "given", "code", "message"),
    [
        ("first", None, "E554", "'measures' starts from the inputs of its sites, and there is no calibration"),
        ("words", [torch.ones(1, 3)], "E555", "and 'words' of kind 'embedding' is not given rows of numbers"),
        ("first", [], "E556", "there are no batches to calibrate with"),
        ("first", torch.ones(1, 3), "E556", "calibration is an iterable of batches, not a Tensor"),
        ("first", {"x": torch.ones(1, 3)}, "E556", "calibration is an iterable of batches, not a dict"),
        ("{first, idle}", [torch.ones(1, 3)], "E557", "no calibration batch reached 'idle'"),
        (
            "first",
            [{"x": torch.ones(1, 3), "attention_mask": torch.zeros(1)}],
            "E557",
            "no calibration batch reached 'first'",
        ),
    ],
)
def test_what_is_refused(model, on, given, code, message):
    with pytest.raises(UsageError) as caught:
        compiler.apply(model, f"{MEASURES} adapter a = measures {{ on {on} }}", calibration=given)
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert message in found.message


def test_what_is_not_asked_for_is_not_run(model):
    compiler.apply(model, "adapter a = lora(rank = 2) { on first }", calibration=["no batch"])


def test_what_a_start_needs_and_no_more_is_made():
    text = """method m(given: bool = true) {
        on linear
        const C[in, in] = normal once
        const D[in, in] = C @ C once
        const E[in, in] = normal once
        param A[in, in] = D if given else E saved "A"
        W' = W @ A
    }
    adapter a = m { on {"0"} }"""
    plan = resolve(read_spec(text).adapters[0], survey(nn.Sequential(nn.Linear(2, 2))))
    assert plan.sites[0].bound.sources(["A"]) == {"C", "D"}
    assert plan.sites[0].bound.sources([]) == frozenset()


def test_a_picture_and_an_explanation_need_no_data(model):
    spec = f"{MEASURES} adapter a = measures {{ on first }}"
    assert b"first" in compiler.draw(spec, model, inputs=(torch.ones(1, 2, 3),))
    assert "first" in str(compiler.explain(spec, model))
