"""Adapted quantized models under torch.compile, and exported to be run where only the operators are known."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.matrix import wide
from tests.quantized_models import IDS, assert_same, logits, pair, stored

CASES = [("nf4", "aot_eager"), ("int8", "aot_eager"), ("nf4", "inductor"), ("int8", "inductor")]

FRESH = """
import sys
import torch
import transformers.modeling_outputs  # the class of what the model returns
if len(sys.argv) > 2:
    import peftc.passes.quantized.packed_operators
    assert not any(each.startswith(("peftc.runtime", "peftc.compiler")) for each in sys.modules)
ids, wanted = torch.load(sys.argv[1] + ".in")
found = torch.export.load(sys.argv[1]).module()(input_ids=ids, use_cache=False)
assert torch.equal(found.logits if hasattr(found, "logits") else found, wanted)
"""


def step(adapted, called, ids=IDS):
    """Logits and gradients."""
    adapted.zero_grad()
    output = called(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {
        name: each.grad.clone() for name, each in adapted.named_parameters() if each.grad is not None
    }


@pytest.mark.parametrize(
    ("kind", "backend"), [pytest.param(*each, marks=() if each == CASES[0] else pytest.mark.matrix) for each in CASES]
)
def test_compiled_as_one_graph_and_switched_without_another(kind, backend):
    torch._dynamo.reset()
    base, adapted = pair(kind)
    before = stored(base)
    compiled = torch.compile(adapted, backend=backend, fullgraph=True, dynamic=True)
    adapted.train()
    try:
        wanted = {}
        for name in "ba":
            adapted.set_adapter(name)
            wanted[name] = step(adapted, adapted)
        step(adapted, compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in "ba":
                adapted.set_adapter(name)
                assert_close(step(adapted, compiled), wanted[name], rtol=1e-4, atol=1e-5)
        assert set(wanted["a"][1]).isdisjoint(wanted["b"][1])
        assert_same(stored(base), before)
    finally:
        adapted.zero_grad()
        adapted.set_adapter("a")
        adapted.eval()


@pytest.mark.parametrize("kind", wide(["nf4", "int8"], ["nf4"]))
def test_an_exported_program_needs_the_operators_and_nothing_else(kind, tmp_path):
    _, adapted = pair(kind)
    wanted = logits(adapted)
    with torch.no_grad():
        program = torch.export.export(adapted, (), {"input_ids": IDS, "use_cache": False}, strict=False)
    assert "peftc.packed_linear.default" in {str(node.target) for node in program.graph.nodes}
    path = str(tmp_path / "model.pt2")
    torch.export.save(program, path)
    torch.save((IDS, wanted), f"{path}.in")
    fresh = [sys.executable, "-c", FRESH, path]
    done = subprocess.run([*fresh, "with"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if kind == "int8":
        refused = subprocess.run(fresh, capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "packed_linear" in refused.stderr
