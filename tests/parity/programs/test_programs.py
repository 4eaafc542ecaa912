"""Exported programs, run where there is only torch, give what the adapted model gives."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from peftc.compiler import SpecError
from tests.matrix import wide
from tests.parity.programs import cases as cases
from tests.parity.programs.cases import MODELS, SPEAKERS, SPECS
from tests.torch_only import TorchOnly

METHODS = ("lora", "dora", "ia3", "oft", "prefix", "tokens")
ALWAYS = (
    "llama lora inputs generate",
    "llama prefix merged generate",
    "llama tokens routed generate",
    "gpt2 dora inputs generate",
    "gpt2 ia3 routed generate",
    "bert oft inputs forward",
    "vit lora merged forward",
    "vit prefix inputs forward",
)
# Merged, methods of the weights leave the same program. A program that generates is the plain one and more.
MERGED = ("lora", "prefix", "tokens")
CELLS = [
    f"{model} {method} {adapters} {entry}"
    for model in MODELS
    for method in METHODS
    for adapters in ("merged", "inputs", "routed")
    for entry in ("generate", "forward")
    if (entry == "generate") == (model in SPEAKERS) or model == "llama"
    if adapters != "merged" or method in MERGED
    if (model, method) != ("vit", "tokens")
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchOnly]:
    """A process that has only torch."""
    process = TorchOnly(tmp_path_factory.mktemp("jobs"))
    yield process
    process.close()


@pytest.mark.parametrize("cell", wide(CELLS, ALWAYS))
def test_a_program_gives_what_the_adapted_model_gives(cell: str, alone: TorchOnly, tmp_path: Path) -> None:
    name, method, adapters, entry = cell.split()
    calls = cases.calls(name, entry)
    plain = cases.said(cases.host(name), calls)
    with cases.hosted(cases.host(name), [SPECS[method]] * 2) as adapted:
        results = {}
        for each in ("a", "b"):
            adapted.set_adapter(each)
            results[each] = cases.said(adapted, calls)
        adapted.set_adapter("a")
        adapted.export(tmp_path / "out", format="pt2", adapters=adapters, entry=entry, max_length=48)
    ids = [torch.tensor([1, 0, 1, 1, 0][: len(next(iter(each.inputs.values())))]) for each in calls]
    runs = [{}]
    expected = [results["a"]]
    if adapters == "inputs":
        runs, expected = [{"adapter": "a"}, {"adapter": "b"}], [results["a"], results["b"]]
    elif adapters == "routed":
        runs, expected = [{"ids": ids}], [cases.rows_of(results, ids)]
    for run, wanted in zip(runs, expected, strict=True):
        jobs = []
        for index, each in enumerate(calls):
            given = {**each.inputs, **({"adapter_ids": run["ids"][index]} if "ids" in run else {})}
            jobs.append({"entry": each.entry, "inputs": given, "after": each.after, "adapter": run.get("adapter")})
        for call, got, right in zip(calls, alone.call(tmp_path / "out", jobs), wanted, strict=True):
            for key, value in right.items():
                found, value = (cases.visible(call, key, each) for each in (got[key], value))
                size = max(1.0, float(value.abs().max()))
                assert_close(found, value, rtol=1e-5, atol=1e-5 * size, msg=lambda text, key=key: f"{key}: {text}")
    for index in range(len(calls)):
        one, other, none = (each[index]["logits"] for each in (results["a"], results["b"], plain))
        assert min((one - other).abs().max(), (one - none).abs().max()) > 1e-3, "the adapters do something"


def test_what_has_no_vocabulary_has_no_tokens() -> None:
    with pytest.raises(SpecError):
        cases.host("vit").add_adapter(f"adapter a = {SPECS['tokens']}")
