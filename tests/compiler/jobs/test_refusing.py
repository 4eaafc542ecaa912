"""What passes leave as it is, told by `peftc explain --why`."""

from pathlib import Path

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.load_model.models import FoundModel
from peftc.compiler.report.facts import RefusalFacts
from tests.compiler.commands.cli_help import peftc

TINY = Path(__file__).parents[3] / "examples" / "tiny-llama"


class Odd(nn.Linear):
    """A linear that does not call the operator of that name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd, self.even = Odd(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self.even(x))


SPEC = "adapter one = lora(rank = 2) { on odd, even } adapter two = dora(rank = 2) { on even }"


@pytest.fixture
def facts():
    found = FoundModel(Net(), "Net", "factory", example_inputs={"x": torch.ones(2, 3, 4)})
    return compiler.explain(SPEC, found, tokens=(1,), why=True)


def test_each_that_is_explained_alone_has_its_own(facts):
    one, two = facts.together
    assert (one.adapters, two.adapters) == (("one",), ("two",))
    (refused,) = [each for each in one.refusals if each.made_by == "insert-delta"]
    assert (refused.site, refused.reason) == ("odd", "the weight is used by aten.numpy_T.default")
    assert two.refusals
    assert all(isinstance(each, RefusalFacts) and each.reason and each.node for each in two.refusals)
    assert {each.site for each in two.refusals} == {"even"}
    assert facts.to_json()["together"][0]["refusals"][0]["reason"]


def test_without_asking_there_are_none(tmp_path):
    spec = tmp_path / "some.adapter"
    spec.write_text("adapter a = lora(rank = 2) { on q_proj }")
    (together,) = peftc("explain", spec, TINY, "--json").json["together"]
    assert together["refusals"] is None


def test_the_table(tmp_path):
    spec = tmp_path / "some.adapter"
    spec.write_text("adapter a = dora(rank = 2) { on layers[*].self_attn.q_proj }")
    done = peftc("explain", spec, TINY, "--why", "--tokens", 1)
    assert done.code == 0, done.err
    table = done.out[done.out.index("left as it is") :]
    assert "stop-early" in table or "fuse-low-rank" in table
    assert "self_attn.q_proj" in table
