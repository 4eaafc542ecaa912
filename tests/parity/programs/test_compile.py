"""Under torch.compile there is one graph, and switching adapters makes no other."""

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

ONE = "adapter one = lora(rank = 4, alpha = 8) { on all linear }"
TWO = "adapter two = lora(rank = 4, alpha = 2) { on all linear }"
OTHER = "adapter other = lora(rank = 2) { on q_proj }"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What other tests compiled counts against nobody."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ours(zoo: Any) -> Iterator[Any]:
    """A Llama with two adapters of one structure."""
    with zoo.hosted("llama") as host:
        for seed, spec in enumerate((ONE, TWO)):
            host.add_adapter(spec)
            zoo.randomise(host, seed)
        yield host


@pytest.mark.parametrize("name", ["llama", "t5", "moe"])
def test_one_graph(name: str, zoo: Any) -> None:
    with zoo.hosted(name) as model:
        model.add_adapter("adapter a = lora(rank = 4, alpha = 8) { on all linear }")
        zoo.randomise(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for rows, length in zoo.shapes(name)[1:]:
            batch = zoo.batch(name, rows, length)
            torch.testing.assert_close(zoo.logits(compiled, batch), zoo.logits(model, batch), atol=1e-5, rtol=1e-5)


def test_switching_recompiles_nothing(ours: Any, zoo: Any) -> None:
    batch = zoo.batch("llama", 2, 7)
    wanted = {}
    for name in ("one", "two"):
        ours.set_adapter(name)
        wanted[name] = zoo.logits(ours, batch)
    assert (wanted["one"] - wanted["two"]).abs().max() > 1e-3
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=True)
    zoo.logits(compiled, batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("one", "two", "one", "two"):
            ours.set_adapter(name)
            torch.testing.assert_close(zoo.logits(compiled, batch), wanted[name], atol=1e-5, rtol=1e-5)
        ours.set_adapter({"one": 0.5})
        half = zoo.logits(compiled, batch)
        assert min((half - each).abs().max() for each in wanted.values()) > 1e-3
        for rows, length in ((3, 5), (4, 11)):
            other = zoo.batch("llama", rows, length)
            torch.testing.assert_close(zoo.logits(compiled, other), zoo.logits(ours, other), atol=1e-5, rtol=1e-5)


def test_another_structure_is_compiled_anew(ours: Any, zoo: Any) -> None:
    """So the test above can fail: what changes the graph is seen."""
    batch = zoo.batch("llama", 2, 7)
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=True)
    zoo.logits(compiled, batch)
    ours.add_adapter(OTHER)
    zoo.randomise(ours)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        zoo.logits(compiled, batch)
    torch.testing.assert_close(zoo.logits(compiled, batch), zoo.logits(ours, batch), atol=1e-5, rtol=1e-5)
    with ours.disable_adapter():
        torch.testing.assert_close(zoo.logits(compiled, batch), zoo.logits(ours, batch), atol=1e-5, rtol=1e-5)


def test_training(ours: Any, zoo: Any) -> None:
    batch = {**zoo.batch("llama", 2, 7), "labels": zoo.labels("llama", 2, 7)}
    ours.train()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    gradients = []
    for model in (ours, compiled):
        ours.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: each.grad.clone() for name, each in ours.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(".two." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_inductor(zoo: Any, tmp_path: Any) -> None:
    theirs = zoo.peft("llama", peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    theirs.save_pretrained(tmp_path)
    with zoo.hosted("llama") as ours:
        ours.load_adapter(tmp_path, "pefts")
        ours.set_adapter("pefts")
        batch = zoo.batch("llama", 2, 7)
        compiled = torch.compile(ours, fullgraph=True, dynamic=True)
        got = zoo.logits(compiled, batch)
        torch.testing.assert_close(got, zoo.logits(theirs, batch), atol=1e-4, rtol=1e-4)
        assert (got - zoo.logits(zoo.model("llama"), batch)).abs().max() > 1e-3
