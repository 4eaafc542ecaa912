"""What a program is exported from, who loads it, and what exporting leaves as it was."""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.exporters import ExportedModel

from peftc import compiler
from peftc.compiler import ModelError, UsageError
from tests import zoo
from tests.matrix import wide
from tests.parity.programs import cases as cases
from tests.parity.programs.cases import SPECS
from tests.torch_only import read_bank, read_tensors

NEAR = dict(rtol=1e-5, atol=1e-5)
LORA = SPECS["lora"]


class Net(nn.Module):
    """No model of transformers'; its head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.mix(self.embed(ids))) * scale
        return {"scores": self.head(hidden), "hidden": hidden}


@pytest.fixture(scope="module")
def llama() -> Any:
    """An adapted Llama without adapters; it keeps its traces."""
    return cases.host("llama")


@pytest.fixture
def adapted(llama: Any) -> Iterator[Any]:
    """With two."""
    with cases.hosted(llama, [LORA] * 2) as adapted:
        yield adapted


def program(directory: Path, name: str = "forward") -> Any:
    return torch.export.load(directory / f"{name}.pt2").module()


def words(rows: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    ids, mask = cases.text(rows, length, padded=True)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outcome(model: Any, given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    given = given or words()
    mask = given["attention_mask"].bool()
    return model(**given, use_cache=False).logits[mask]


@torch.no_grad()
def shown(module: Any, **beside: Any) -> torch.Tensor:
    given = words()
    return module(**given, **beside)["logits"][given["attention_mask"].bool()]


class Before:
    """An adapted model as it was: its tensors, by object and by value, and its state."""

    def __init__(self, adapted: Any):
        self._adapted = adapted
        tensors = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}
        self._tensors = {name: (each, each.detach().clone(), each.requires_grad) for name, each in tensors.items()}
        self._state = self._read()
        self._output = outcome(adapted)
        self._traces = self._count()

    def _read(self) -> tuple[Any, ...]:
        state, adapted = self._adapted._adapter_state, self._adapted
        return state.active, state.displaced, state.names(), adapted.training, copy.deepcopy(adapted.config.to_dict())

    def _count(self) -> int:
        return len(self._adapted._adapter_state.engine._traces)

    def check(self) -> None:
        """Nothing is another, and a call needs no new trace."""
        tensors = {**dict(self._adapted.named_parameters()), **dict(self._adapted.named_buffers())}
        assert list(tensors) == list(self._tensors)
        for name, (each, value, trained) in self._tensors.items():
            assert tensors[name] is each
            assert torch.equal(each, value)
            assert each.requires_grad is trained
        assert self._read() == self._state
        before = self._count()
        assert torch.equal(outcome(self._adapted), self._output)
        assert self._count() == before


def test_transformers_loads_the_directory(adapted: Any, tmp_path: Path) -> None:
    adapted.export(tmp_path / "plain", format="pt2", entry="forward")
    loaded = ExportedModel.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    assert_close(shown(loaded), outcome(adapted), **NEAR)
    assert loaded.config.hidden_size == 32
    calls = cases.calls("llama", "generate")
    said = cases.said(adapted, calls)
    adapted.export(tmp_path / "speaks", format="pt2")
    runners = ExportedModel.from_pretrained(tmp_path / "speaks", trust_remote_code=True).runners
    empty = {f"past_0_{role}": torch.zeros(1, 2, 0, 8) for role in ("key", "value")}
    first = runners["prefill"](**calls[0].inputs, **empty)
    assert_close(first["logits"], said[0]["logits"], **NEAR)
    past = {name.replace("present", "past"): first[name] for name in first if name != "logits"}
    assert_close(runners["decode"](**calls[1].inputs, **past)["logits"], said[1]["logits"], **NEAR)


def test_one_program_serves_sixteen_adapters(llama: Any, tmp_path: Path) -> None:
    """To swap them is to pass another dictionary, and does nothing to the program."""
    names = [f"n{index}" for index in range(16)]
    with cases.hosted(llama, [LORA] * 16, names) as adapted:
        adapted.export(tmp_path / "out", format="pt2", adapters="inputs", entry="forward")
        module = program(tmp_path / "out")
        code, graph = module.code, module.graph
        held = {name: (each, each._version) for name, each in module.state_dict(keep_vars=True).items()}
        found = []
        for name in names:
            adapted.set_adapter(name)
            tensors = read_tensors(tmp_path / "out" / "adapters" / f"{name}.safetensors")
            found.append(shown(module, adapter=tensors))
            assert_close(found[-1], outcome(adapted), **NEAR)
        assert module.graph is graph
        assert module.code == code
        for name, each in module.state_dict(keep_vars=True).items():
            assert each is held[name][0]
            assert each._version == held[name][1]
    for index, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[:index])


@pytest.mark.parametrize("adapters", wide(("merged", "inputs", "routed"), ()))
def test_bfloat16(adapters: str, tmp_path: Path) -> None:
    """Merged weights are rounded once more, so the model to be near to is the merged one."""
    model = cases.model("llama").to(torch.bfloat16)
    adapted = compiler.apply(model, f"adapter a = {LORA}  adapter b = {LORA}  activate a").eval()
    for seed, name in enumerate("ab"):
        cases.move(adapted, name, seed)
    adapted.export(tmp_path / "out", format="pt2", adapters=adapters, entry="forward")
    module = program(tmp_path / "out")
    beside: dict[str, Any] = {}
    if adapters == "inputs":
        beside["adapter"] = read_tensors(tmp_path / "out" / "adapters" / "a.safetensors")
    elif adapters == "routed":
        beside |= {"adapter_ids": torch.tensor([0, 0]), "bank": read_bank(tmp_path / "out")}
    else:
        adapted.merge_adapter()
    found = shown(module, **beside)
    assert found.dtype == torch.bfloat16
    assert_close(found, outcome(adapted), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("adapters", ["merged", "inputs", "routed"])
def test_a_module_of_ones_own(adapters: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = "lora(rank = 2) { on mix, head }"
    adapted = compiler.apply(Net(), f"adapter a = {spec}  adapter b = {spec}  activate a").eval()
    for seed, name in enumerate("ab"):
        cases.move(adapted, name, seed, 0.5)
    given = {"ids": torch.randint(0, 16, (3, 4)), "scale": torch.randn(3, 4, 1)}
    adapted.export(tmp_path / "out", format="pt2", adapters=adapters, example_inputs=given)
    module = program(tmp_path / "out")
    for rows in (1, 5):
        given = {"ids": torch.randint(0, 16, (rows, 4)), "scale": torch.randn(rows, 4, 1)}
        results = {}
        with torch.no_grad():
            for name in "ba":
                adapted.set_adapter(name)
                results[name] = adapted(**given)
        for name, right in results.items():
            if adapters == "merged" and name == "b":
                continue
            beside: dict[str, Any] = {}
            if adapters == "inputs":
                beside["adapter"] = read_tensors(tmp_path / "out" / "adapters" / f"{name}.safetensors")
            elif adapters == "routed":
                beside |= {"adapter_ids": torch.full((rows,), "ab".index(name)), "bank": read_bank(tmp_path / "out")}
            found = module(**given, **beside)
            assert set(found) == set(right)
            for key, value in right.items():
                assert_close(found[key], value, **NEAR)
        assert (results["a"]["scores"] - results["b"]["scores"]).abs().max() > 1e-3


COMBINED = {
    "weighted": f"adapter a = {LORA}  adapter b = lora(rank = 2) {{ on q_proj }}  activate a + 0.5 * b",
    "one in front": f"adapter a = {LORA}  adapter p = prefix(length = 3)  activate a + p",
    "a prompt in front": f"adapter a = {LORA}  adapter p = prompt(length = 3)  activate a + p",
    "copies": "adapter a = lora(rank = 2) { on q_proj  train lm_head }",
    "norms": "adapter a = ln_tuning",
}


@pytest.mark.parametrize("case", wide(COMBINED, ()))
def test_merged_as_they_are_combined(case: str, tmp_path: Path) -> None:
    adapted = compiler.apply(cases.model("llama"), COMBINED[case]).eval()
    for seed, name in enumerate(adapted._adapter_state.names()):
        cases.move(adapted, name, seed)
    before = Before(adapted)
    adapted.export(tmp_path / "out", format="pt2", entry="forward")
    places = (words()["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # what stands in front of a text comes before them
    found = shown(program(tmp_path / "out"), **({"position_ids": places} if case == "a prompt in front" else {}))
    assert_close(found, outcome(adapted), **NEAR)
    with adapted.disable_adapter():
        assert (found - outcome(adapted)).abs().max() > 1e-3
    before.check()


@pytest.mark.parametrize("adapters", wide(("merged", "inputs", "routed"), ()))
def test_a_tied_embedding(adapters: str, tmp_path: Path) -> None:
    """The head is adapted, and the embedding, which has the same weight, is not."""
    spec = "lora(rank = 2) { on lm_head, q_proj }"
    model = zoo.make("llama", **cases.LARGE, tie_word_embeddings=True)
    adapted = compiler.apply(model, f"adapter a = {spec}  adapter b = {spec}  activate a").eval()
    for seed, name in enumerate("ab"):
        cases.move(adapted, name, seed)
    before = Before(adapted)
    adapted.export(tmp_path / "out", format="pt2", adapters=adapters, entry="forward")
    beside: dict[str, Any] = {}
    if adapters == "inputs":
        beside["adapter"] = read_tensors(tmp_path / "out" / "adapters" / "a.safetensors")
    elif adapters == "routed":
        beside |= {"adapter_ids": torch.tensor([0, 0]), "bank": read_bank(tmp_path / "out")}
    assert_close(shown(program(tmp_path / "out"), **beside), outcome(adapted), **NEAR)
    before.check()


def _routes_nothing(adapted: Any) -> dict[str, Any]:
    for name in "cd":
        adapted.add_adapter(f"adapter {name} = oft(block = 8) {{ on q_proj }}")
        cases.move(adapted, name, ord(name))
    adapted.set_adapter("a")
    return {"adapters": "routed", "adapter_names": ("a", "c")}


FAILING: dict[str, tuple[Callable[[Any], dict[str, Any]], type[Exception]]] = {
    "too far": (lambda _: {"max_drift": -1.0}, UsageError),
    "not alike": (_routes_nothing, UsageError),
    "after the merge": (lambda _: {"example_inputs": {"input_ids": "text"}}, UsageError),
}


@pytest.mark.parametrize(("adapters", "training"), [("merged", True), ("routed", False)])
def test_exporting_leaves_the_model_as_it_was(adapters: str, training: bool, adapted: Any, tmp_path: Path) -> None:
    adapted.train(training)
    adapted.set_adapter("b")
    before = Before(adapted)
    adapted.export(tmp_path / "out", format="pt2", adapters=adapters, entry="forward")
    before.check()


@pytest.mark.parametrize("case", FAILING)
def test_a_failed_export_leaves_nothing(case: str, adapted: Any, tmp_path: Path) -> None:
    options, kind = FAILING[case]
    given = {"format": "pt2", "entry": "forward", **options(adapted)}
    before = Before(adapted)
    with pytest.raises((kind, ModelError)):
        adapted.export(tmp_path / "out", **given)
    before.check()
    assert not list(tmp_path.iterdir())
