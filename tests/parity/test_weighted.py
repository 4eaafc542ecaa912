"""Adapters that are made of others, against peft's of the same ones."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peftc import compiler
from peftc.grammar.spec.recipe import KINDS
from tests import zoo

IDS = torch.arange(5, 17).reshape(2, 6)
TARGETS = ["q_proj", "down_proj"]
PRUNED = [each for each in KINDS if each.startswith(("ties", "magnitude"))]
DRAWN = [each for each in KINDS if each.startswith("dare")]


class Shapes(nn.Module):
    """A module of every kind that peft's LoRA adapts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.linear = nn.Linear(12, 16)
        self.turned = Conv1D(16, 16)
        self.narrow = nn.Conv1d(1, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 6, (3, 2), padding=1)
        self.point = nn.Conv2d(6, 5, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.turned(torch.tanh(self.linear(self.words(ids)))))
        x = torch.tanh(self.narrow(x.flatten(0, 1).unsqueeze(1)))
        return self.point(torch.tanh(self.wide(x.reshape(len(x), 4, 4, 4)))).flatten(1)


def shapes() -> nn.Module:
    torch.manual_seed(0)
    return Shapes().eval()


def lora(**settings: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings})


def both(
    model: nn.Module, configs: Mapping[str, peft.PeftConfig], directory: Path
) -> tuple[compiler.AdaptedModel, nn.Module]:
    """The same adapters here and in peft, with values that do something."""
    names = list(configs)
    theirs = peft.get_peft_model(copy.deepcopy(model), configs[names[0]], names[0])
    for name in names[1:]:
        theirs.add_adapter(name, configs[name])
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(directory)
    ours = compiler.load(model, directory / names[0], adapter_name=names[0])
    for name in names[1:]:
        ours.load_adapter(directory / name, adapter_name=name)
    return ours.eval(), theirs.eval()


def outputs(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def compare(
    ours: compiler.AdaptedModel,
    theirs: nn.Module,
    directory: Path,
    names: list[str],
    weights: list[float],
    *options: Any,
    again: Callable[[], nn.Module],
    **settings: Any,
) -> None:
    """The new adapter does as peft's, before and after it is merged, and saved and loaded by either."""
    resting = outputs(ours)
    for model in (ours, theirs):
        model.add_weighted_adapter(names, weights, "new", *options, **settings)
    assert torch.equal(outputs(ours), resting), "what was active still is"
    assert not any(each.requires_grad for each in ours.adapter_bank.new.parameters())
    for model in (ours, theirs):
        model.set_adapter("new")
    wanted = outputs(theirs)
    size = float(wanted.abs().max())
    assert (wanted - resting).abs().max() > 1e-3 * size
    assert_close(outputs(ours), wanted, rtol=0, atol=1e-5 * size)
    ours.merge_adapter()
    assert_close(outputs(ours), wanted, rtol=0, atol=1e-5 * size)
    ours.unmerge_adapter()
    ours.save_pretrained(directory / "saved", selected_adapters=["new"])
    assert_close(outputs(compiler.load(again(), directory / "saved" / "new")), wanted, rtol=0, atol=1e-5 * size)
    back = peft.PeftModel.from_pretrained(again(), directory / "saved" / "new").eval()
    assert_close(outputs(back), wanted, rtol=0, atol=1e-5 * size)


@pytest.fixture
def no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn depends on the sizes alone: a fresh adapter, which peft makes first, draws too."""

    def drawn(share: torch.Tensor) -> torch.Tensor:
        made = torch.rand(share.shape, generator=torch.Generator().manual_seed(share.numel()))
        return (made < share).to(share.dtype)

    monkeypatch.setattr(torch, "bernoulli", drawn)


def llama() -> nn.Module:
    return zoo.make("llama", num_hidden_layers=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]], ids=["positive", "negative"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way(kind: str, weights: list[float], tmp_path: Path) -> None:
    model = llama()
    ours, theirs = both(model, {"a": lora(), "b": lora(lora_alpha=3, target_modules=["q_proj", "v_proj"])}, tmp_path)
    density = {"density": 0.5} if kind in (*PRUNED, *DRAWN) else {}
    compare(ours, theirs, tmp_path, ["a", "b"], weights, combination_type=kind, again=llama, **density)


OPTIONS: list[dict[str, Any]] = [
    *({"by": kind, **({"density": 0.5} if kind in (*PRUNED, *DRAWN) else {})} for kind in KINDS),
    {"by": "ties", "density": 0.4, "majority_sign_method": "frequency"},
    {"svd_rank": 2, "svd_clamp": 0.9, "svd_full_matrices": False},
    {"by": "dare_ties_svd", "density": 0.7, "svd_rank": 3, "majority_sign_method": "frequency"},
    {},
]
CALLED = {"by": "combination_type"}


def written(value: Any) -> str:
    """As a spec has it."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(map(str, each.values())) or "left out" for each in OPTIONS])
def test_a_spec_combines_as_peft(options: dict[str, Any], tmp_path: Path) -> None:
    given = "".join(f", {name} = {written(value)}" for name, value in options.items())
    spec = f"""
        adapter a = lora(rank = 4, alpha = 6, init = "random") {{ on q_proj, down_proj }}
        adapter b = lora(rank = 4, alpha = 3, init = "random") {{ on q_proj, v_proj }}
        adapter new = combine(a, b, weights = [0.7, -0.4]{given})
        activate new
    """
    torch.manual_seed(3)
    ours = compiler.apply(llama(), spec).eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a").eval()
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    called = {CALLED.get(name, name): value for name, value in options.items()}
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", **called)
    theirs.set_adapter("new")
    wanted = outputs(theirs)
    size = float(wanted.abs().max())
    assert (wanted - outputs(llama().eval())).abs().max() > 1e-2 * size
    assert_close(outputs(ours), wanted, rtol=0, atol=1e-5 * size)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear_svd"])
def test_every_kind_of_module(kind: str, tmp_path: Path) -> None:
    """Updates are dropped from and taken apart as modules store them. Peft makes nonsense of a Conv1d's."""
    named = ["words", "linear", "turned", "wide", "point", *(["narrow"] if not kind.endswith("svd") else [])]
    every = lora(target_modules=named, r=3)
    ours, theirs = both(shapes(), {"a": every, "b": every}, tmp_path)
    ids = IDS % 20
    for model in (ours, theirs):
        density = {"density": 0.6} if kind in (*PRUNED, *DRAWN) else {}
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", kind, **density)
        model.set_adapter("new")
    wanted = outputs(theirs, ids)
    assert_close(outputs(ours, ids), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    with ours.disable_adapter():
        assert (outputs(ours, ids) - wanted).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", DRAWN)
def test_the_same_seed_drops_the_same(kind: str, start: Any, tmp_path: Path) -> None:
    """Peft makes the new adapter first, and that draws."""
    every = lora(target_modules=["words", "linear", "turned", "wide"], r=3, init_lora_weights=start)
    ours, theirs = both(shapes(), {"a": every, "b": every}, tmp_path)
    for model in (ours, theirs):
        torch.manual_seed(5)
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", kind, density=0.5)
        model.set_adapter("new")
    wanted = outputs(theirs, IDS % 20)
    assert_close(outputs(ours, IDS % 20), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_a_convolution_of_one_axis_is_taken_apart(tmp_path: Path) -> None:
    ours, _ = both(shapes(), dict.fromkeys("ab", lora(target_modules=["narrow"], r=2)), tmp_path)
    ids = IDS % 20
    ours.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", "svd", svd_rank=4)
    ours.set_adapter({"a": 0.7, "b": -0.4})
    wanted = outputs(ours, ids)
    ours.set_adapter("new")
    assert_close(outputs(ours, ids), wanted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("svd", {"svd_rank": 2}),
        ("svd", {"svd_rank": 7}),
        ("svd", {"svd_clamp": 0.9}),
        ("svd", {"svd_clamp": 0.8, "svd_full_matrices": False}),
        ("ties_svd", {"svd_rank": 3, "density": 0.7, "majority_sign_method": "frequency"}),
        ("ties", {"density": 0.2, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.0}),
        ("magnitude_prune", {"density": 1.0}),
    ],
)
def test_settings(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(llama(), {"a": lora(), "b": lora(lora_alpha=2), "c": lora(lora_alpha=9)}, tmp_path)
    names, weights = ["a", "b", "c"], [0.6, -0.3, 0.5]
    if settings.get("density") == 0.0:
        for model in (ours, theirs):
            model.add_weighted_adapter(names, weights, "new", kind, **settings)
            model.set_adapter("new")
        assert_close(outputs(ours), outputs(theirs))
        with ours.disable_adapter():
            assert_close(outputs(ours), outputs(theirs))
        return
    compare(ours, theirs, tmp_path, names, weights, combination_type=kind, again=llama, **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_other_ranks_and_patterns(kind: str, tmp_path: Path) -> None:
    second = lora(r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5}, target_modules="all-linear")
    ours, theirs = both(llama(), {"a": lora(layers_to_transform=[0]), "b": second}, tmp_path)
    resting = outputs(ours)
    for model in (ours, theirs):
        # peft does not reach all of an expression and a list.
        model.add_weighted_adapter(["b"], [0.7], "one")
        model.set_adapter("one")
    assert_close(outputs(ours), outputs(theirs), rtol=0, atol=1e-5)
    ours.add_weighted_adapter(["a", "b"], [0.7, 0.4], "new", kind, svd_rank=9 if kind == "svd" else None)
    ours.set_adapter({"a": 0.7, "b": 0.4})
    wanted = outputs(ours)
    assert (wanted - resting).abs().max() > 1e-3
    ours.set_adapter("new")
    assert_close(outputs(ours), wanted, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "saved", selected_adapters=["new"])
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "saved" / "new").eval()
    assert_close(outputs(back), wanted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_one_adapter_is_exact(tmp_path: Path) -> None:
    ours, theirs = both(llama(), {"a": lora()}, tmp_path)
    ours = compiler.load(llama(), tmp_path / "a", adapter_name="a").eval()
    compare(ours, theirs, tmp_path, ["a"], [-1.5], again=llama)
    ours.set_adapter({"a": -1.5})
    weighted = outputs(ours)
    ours.set_adapter("new")
    assert_close(outputs(ours), weighted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_rank_stabilised_scales(kind: str, tmp_path: Path) -> None:
    """Peft's new adapter divides by the root of its rank, and nothing was multiplied by it."""
    ours, theirs = both(llama(), {"a": lora(use_rslora=True), "b": lora()}, tmp_path)
    for model in (ours, theirs):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", kind)
        model.set_adapter("new")
    assert (outputs(ours) - outputs(theirs)).abs().max() > 1e-3
    if kind == "cat":
        found = outputs(ours)
        ours.set_adapter({"a": 0.5, "b": 0.5})
        assert_close(found, outputs(ours), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [(), ("linear",)])
def test_vectors(options: tuple[str, ...], tmp_path: Path) -> None:
    def config(*targets: str) -> peft.PeftConfig:
        return peft.IA3Config(target_modules=["k_proj", *targets], feedforward_modules=[*targets])

    ours, theirs = both(llama(), {"a": config("down_proj"), "b": config("down_proj", "up_proj")}, tmp_path)
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new")
    ours.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", *options)
    for model in (ours, theirs):
        model.set_adapter("new")
    wanted = outputs(theirs)
    assert_close(outputs(ours), wanted, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "saved", selected_adapters=["new"])
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "saved" / "new").eval()
    assert_close(outputs(back), wanted, rtol=0, atol=1e-5)


def delta(theirs: nn.Module, module: str, name: str) -> torch.Tensor:
    """What peft adds to the weight of a module for an adapter."""
    return theirs.base_model.model.get_submodule(module).get_delta_weight(name)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"b": -1.2, "a": 0.5}, {"b": 0.4}])
def test_weights_are_merged_by_the_formula(weights: dict[str, float], use_rslora: bool, tmp_path: Path) -> None:
    """W + the sum of w times peft's delta, in a model, unloaded, and in a checkpoint; unmerged, W is the same bits."""
    configs = {"a": lora(use_rslora=use_rslora), "b": lora(r=2, target_modules=["q_proj", "v_proj"])}
    model = llama()
    ours, theirs = both(model, configs, tmp_path)
    base = {name: each.clone() for name, each in model.state_dict().items()}
    wanted = {name: each.clone() for name, each in base.items()}
    for name, weight in weights.items():
        for target in configs[name].target_modules:
            for key in base:
                module = key.removesuffix(".weight")
                if module.endswith(target):
                    wanted[key] += weight * delta(theirs, module, name)
    moved = [key for key in base if not torch.equal(base[key], wanted[key])]
    assert len(moved) == 2 * len({target for name in weights for target in configs[name].target_modules})

    assert_close(ours.merge_and_unload(adapter_names=weights).state_dict(), wanted, rtol=0, atol=1e-6)
    active = ours.active_adapters()
    ours.export(tmp_path / "out", adapter_names=weights)
    assert ours.active_adapters() == active
    saved = type(model).from_pretrained(tmp_path / "out")
    assert_close(saved.state_dict(), wanted, rtol=0, atol=1e-6)
    ours.merge_adapter(adapter_names=weights)
    found = ours.state_dict()
    assert_close({key: found[key] for key in moved}, {key: wanted[key] for key in moved}, rtol=0, atol=1e-6)
    ours.unmerge_adapter()
    found = ours.state_dict(keep_vars=True)
    own = dict(model.named_parameters())
    assert all(torch.equal(found[key], base[key]) and found[key].data_ptr() == own[key].data_ptr() for key in moved)
