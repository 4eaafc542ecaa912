"""What torch does with any module it does with an adapted one: functional calls, pickles, copies, exports, threads."""

import copy
import pickle
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from tests.parity.tree.tree import IDS, QV, llama, logits, pair

SPEC = 'adapter a = lora(rank = 4, init = "random") { on q_proj, v_proj }'


def test_functional_call_is_given_the_adapters_tensors(tmp_path: Path) -> None:
    base = llama()
    ours, _ = pair(base, QV, tmp_path)
    own = logits(ours)
    trained = {name: each.detach() for name, each in ours.named_parameters() if each.requires_grad}
    assert len(trained) == 8

    def call(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(ours, values, (IDS,), {"labels": IDS}).loss

    with torch.no_grad():
        zeros = {name: torch.zeros_like(each) for name, each in trained.items()}
        assert_close(torch.func.functional_call(ours, zeros, (IDS,)).logits, logits(base))
    got = torch.func.grad(call)(trained)
    ours(IDS, labels=IDS).loss.backward()
    for name, each in ours.named_parameters():
        if each.requires_grad:
            assert_close(got[name], each.grad, atol=1e-6, rtol=1e-5)
    assert torch.equal(logits(ours), own), "what was given once does not stay"


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_models_of_their_own(copied: Any, warm: bool, tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    if warm:
        logits(ours)
    other = copied(ours)
    assert_close(logits(other), logits(theirs), atol=1e-5, rtol=1e-5)
    other(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for each in other.parameters():
            if each.requires_grad:
                assert each.grad is not None
                each.zero_()
    assert not any(each.grad is not None for each in ours.parameters())
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(other), logits(ours), atol=1e-3)


def test_torch_export_of_a_model_that_was_never_called(tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path)
    program = torch.export.export(ours, (IDS,), {"use_cache": False}, strict=False)
    assert_close(program.module()(IDS, use_cache=False).logits, logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["whole", "in place", "layers"])
def test_compiled_and_switched_without_another_graph(what: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    ours, theirs = pair(llama(), QV, tmp_path)
    ours.load_adapter(tmp_path, "other")
    with torch.no_grad():
        for name, each in ours.named_parameters():
            if ".other." in name:
                each.mul_(2.0)
    made = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    wanted = {}
    for name in ("other", "default"):
        ours.set_adapter(name, inference_mode=True)
        wanted[name] = logits(ours)
    assert_close(wanted["default"], logits(theirs), atol=1e-5, rtol=1e-5)
    if what == "whole":
        called = torch.compile(ours, backend=backend, fullgraph=True)
    else:
        called, state = ours, set(ours.state_dict())
        for each in [ours] if what == "in place" else ours.model.layers:
            each.compile(backend=backend, fullgraph=True)
        assert set(ours.state_dict()) == state, "what was compiled is no part of the model"
    assert_close(logits(called), wanted["default"], atol=1e-5, rtol=1e-5)
    count = len(made)
    assert count == (2 if what == "layers" else 1)
    ours.set_adapter("other", inference_mode=True)
    assert_close(logits(called), wanted["other"], atol=1e-5, rtol=1e-5)
    assert len(made) == count
    torch._dynamo.reset()


def test_threads_that_call_while_another_switches() -> None:
    """No call is served by a bit of one adapter and a bit of another, and the first calls race for their programs."""
    model = compiler.apply(llama(), SPEC).eval()
    model.add_adapter(SPEC.replace("adapter a", "adapter b"))
    reference = copy.deepcopy(model)
    legal = {}
    for name in "ab":
        reference.set_adapter(name, inference_mode=True)
        legal[name] = logits(reference)
    model.set_adapter("a", inference_mode=True)
    found: Counter[str] = Counter()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            out = logits(model)
            found[next((name for name, each in legal.items() if torch.allclose(out, each, atol=1e-5)), "neither")] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    threads = [threading.Thread(target=read) for _ in range(4)]
    try:
        for each in threads:
            each.start()
        for turn in range(400):
            model.set_adapter("ab"[turn % 2], inference_mode=True)
            stop.wait(0.005)
    finally:
        stop.set()
        for each in threads:
            each.join(30)
        sys.setswitchinterval(interval)
    assert set(found) == {"a", "b"}, found
