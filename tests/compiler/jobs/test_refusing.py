"""What passes leave as it is, told by `peftc explain --why`."""

from pathlib import Path

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.load_model.models import FoundModel
from peftc.compiler.report.facts import RefusalFacts, TogetherFacts
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


class Choosy(nn.Module):
    """What it computes depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.blocks:
            x = each(x)
        return x


def explained(spec: str, *blocks: nn.Module, why: bool = True) -> TogetherFacts:
    found = FoundModel(Stack(*blocks), "Stack", "factory", example_inputs={"x": torch.ones(2, 3, 4)})
    (together,) = compiler.explain(spec, found, tokens=(1,), why=why).together
    return together


def test_what_cannot_be_traced_is_told_when_asked():
    spec = "adapter a = lora(rank = 2) { on fc }"
    asked = explained(spec, Choosy(), Choosy())
    (split,) = asked.regions.splits
    assert (split.modules, split.called, split.refused) == (("blocks.0", "blocks.1"), True, False)
    assert split.why.startswith("Choosy cannot be traced for this call")
    assert [(each.modules, each.traces) for each in asked.regions.regions] == [(("blocks.0.fc", "blocks.1.fc"), 1)]
    assert asked.untraced.startswith("Stack cannot be traced for this call")
    assert asked.refusals == ()
    unasked = explained(spec, Choosy(), Choosy(), why=False)
    assert (unasked.regions.splits, unasked.untraced) == ((), "")


class Table(nn.Embedding):
    """What it gives depends on data."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) if ids.sum() > 0 else super().forward(ids + 1)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)


def test_what_is_refused_is_told_when_asked():
    found = FoundModel(Reader(), "Reader", "factory", example_inputs={"x": torch.ones(2, 3, dtype=torch.int64)})
    spec = "adapter a = trainable_tokens { tokens [3, 4] in table }"
    (together,) = compiler.explain(spec, found, tokens=(1,), why=True).together
    (split,) = together.regions.splits
    assert (split.modules, split.refused) == (("table",), True)


def test_a_call_that_the_model_refuses():
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("not today")

    with pytest.raises(compiler.ModelError, match=r"E402.*not today"):
        explained("adapter a = lora(rank = 2) { on fc }", Choosy(), Wrong())


def test_the_table_of_what_is_split(place):
    (place / "some.adapter").write_text("adapter a = lora(rank = 2) { on fc }")
    done = peftc("explain", "some.adapter", "tests.compiler.jobs.test_refusing:choosy", "--why", "--tokens", 1)
    assert done.code == 0, done.err
    table = " ".join(done.out[done.out.index("region") :].split())
    assert "blocks[0, 1].fc Linear the module around it is split 2 1 1" in table or "blocks[0..2].fc" in table
    assert "blocks[0..2] some Choosy cannot be traced for this call" in table
    assert "there is no graph of the whole model: Stack cannot be traced" in table


def choosy():
    return Stack(Choosy(), Choosy()), {"x": torch.ones(2, 3, 4)}
