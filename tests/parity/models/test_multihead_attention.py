"""Every method on torch's MultiheadAttention, whose weights peft changes twice over or not at all."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.grammar.diagnostics import AdapterError

METHODS = {"lora": "rank = 2, alpha = 6", "dora": "rank = 2", "loha": "rank = 2", "hira": "rank = 2"}
KINDS = ("own", "cross", "widths", "encoder")


class Own(nn.Module):
    """Looks at itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Cross(nn.Module):
    """Looks at another sequence, of another width if one is given."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **widths)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.attn(x, y, y)[0]


def encoder() -> nn.Module:
    """Torch's own encoder, which has a way of its own to run in evaluation."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": Own,
    "cross": Cross,
    "widths": lambda: Cross(kdim=6, vdim=6),
    "encoder": encoder,
}


def bench(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], str]:
    """A model, inputs, and what its attention is called."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    other = torch.randn(2, 3, 6 if name == "widths" else 8)
    inputs = (torch.randn(2, 5, 8), other) if name in ("cross", "widths") else (torch.randn(2, 5, 8),)
    return model, inputs, "self_attn" if name == "encoder" else "attn"


@functools.cache
def ready(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], str, compiler.AdaptedModel]:
    """A bench, and an adapted model of it that tests put their adapters into: one trace serves them all."""
    model, inputs, attention = bench(name)
    return model, inputs, attention, adapt(model)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test draws the same numbers, whichever ran before it, and leaves no adapter behind."""
    torch.manual_seed(1)
    yield
    for name in KINDS:
        adapted = ready(name)[-1]
        if adapted._adapter_state.displaced:
            adapted.unmerge_adapter()
        adapted.delete_adapter(adapted._adapter_state.names())
        adapted.eval()


def randomised(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.4)
    return model


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def by_hand(adapted: nn.Module, model: nn.Module, inputs: tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
    """The model with LoRA's change added to its weights."""
    weights = dict(model.named_parameters())
    bank = {name.partition(".")[2]: each for name, each in adapted.named_parameters() if "adapter_bank" in name}
    bank = {name.partition(".")[2]: each.detach() for name, each in bank.items()}
    changed = {}
    bank = {name.replace("__", "."): each for name, each in bank.items()}
    for name in {key.rpartition(".")[0] for key in bank}:
        weight = name if name in weights else f"{name}.weight"
        changed[weight] = weights[weight].detach() + scale * bank[f"{name}.B"] @ bank[f"{name}.A"]
    return torch.func.functional_call(model, changed, inputs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_lora_by_hand(name: str, training: bool) -> None:
    model, inputs, attention, adapted = ready(name)
    adapted.add_adapter(f"adapter a = lora(rank = 2, alpha = 6) {{ on {attention} }}")
    adapted.train(training)
    with torch.no_grad():
        close(adapted(*inputs), model(*inputs))
        randomised(adapted, "adapter_bank")
        expected = by_hand(adapted, model, inputs, 3.0)
        close(adapted(*inputs), expected)
        assert (expected - model(*inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unmerged_and_everything_trains(method: str, name: str, tmp_path: Path) -> None:
    _, inputs, attention, adapted = ready(name)
    adapted.add_adapter(f"adapter a = {method}({METHODS[method]}) {{ on {attention} }}")
    with torch.no_grad():
        before = adapted(*inputs)
        unmerged = randomised(adapted, "adapter_bank")(*inputs)
        assert (unmerged - before).abs().max() > 1e-2
        adapted.merge_adapter()
        close(adapted(*inputs), unmerged)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(*inputs), unmerged)
        close(adapted.merge_and_unload()(*inputs), unmerged)
        adapted.save_pretrained(tmp_path)
        adapted.load_adapter(tmp_path, "loaded")
        adapted.set_adapter("loaded")
        close(adapted(*inputs), unmerged)
        adapted.delete_adapter("loaded")
        adapted.set_adapter("a")
    adapted.train()(*inputs).square().sum().backward()
    assert all(float(each.grad.abs().max()) > 0 for each in adapted.parameters() if each.requires_grad)


@pytest.mark.filterwarnings("ignore")
def test_both_ways_as_far_as_peft_is_right(tmp_path: Path) -> None:
    """Peft applies the output projection's change twice, so that one is nothing here."""
    model, inputs, _, loaded = ready("own")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attn"]))
    randomised(wrapped, "lora_")
    for name, parameter in wrapped.named_parameters():
        if "out_proj.lora_B" in name:
            nn.init.zeros_(parameter)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    loaded.load_adapter(tmp_path / "theirs", "theirs")
    with torch.no_grad():
        expected = wrapped(*inputs)
        close(loaded(*inputs), expected)
        assert (expected - model(*inputs)).abs().max() > 1e-2
        loaded.save_pretrained(tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        close(back(*inputs), expected)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn"]


@pytest.mark.filterwarnings("ignore")
def test_a_peft_checkpoint_means_its_formula(tmp_path: Path) -> None:
    model, inputs, _, loaded = ready("cross")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attn"])
    wrapped = randomised(peft.get_peft_model(copy.deepcopy(model), config).eval(), "lora_")
    wrapped.save_pretrained(tmp_path)
    loaded.load_adapter(tmp_path, "loaded")
    with torch.no_grad():
        close(loaded(*inputs), by_hand(loaded, model, inputs, 3.0))
        with pytest.raises(AssertionError):
            close(loaded(*inputs), wrapped(*inputs))


@pytest.mark.filterwarnings("ignore")
def test_ranks_of_its_own_both_ways(tmp_path: Path) -> None:
    model, _, _ = bench("own")
    spec = "adapter a = lora(rank = 3) { on attn, head  refine attn with rank = 2, alpha = 6 }"
    compiler.apply(model, spec).save_pretrained(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    shapes = {name: tuple(each.shape) for name, each in wrapped.named_parameters() if "lora_A" in name}
    assert sorted(shapes.values()) == [(2, 8), (2, 8), (3, 8)]
    assert wrapped.base_model.model.attn.scaling == {"default": 3.0}


def test_a_part_alone(tmp_path: Path) -> None:
    """Peft adapts the packed weight alone as a parameter, and the two of them only alike."""
    model, inputs, _ = bench("own")
    adapted = compiler.apply(model, "adapter a = lora(rank = 2) { on attn  skip attn.out_proj }").eval()
    randomised(adapted, "adapter_bank").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([], ["attn.in_proj_weight"])
    with torch.no_grad():
        close(compiler.load(model, tmp_path)(*inputs), adapted(*inputs))
    uneven = compiler.apply(model, "adapter a = lora(rank = 2) { on attn  refine out_proj with rank = 4 }")
    with pytest.raises(AdapterError, match="'rank' differs within 'attn'"):
        uneven.save_pretrained(tmp_path / "uneven")


def test_dropout_where_there_is_an_input_to_drop() -> None:
    """Packed weights that are cut into parts meet no one activation."""
    spec = "adapter a = lora(rank = 2, dropout = 0.5) { on attn }"
    for name in ("own", "widths"):
        _, inputs, _, adapted = ready(name)
        adapted.add_adapter(spec)
        randomised(adapted, "adapter_bank").train()
        assert not torch.equal(adapted(*inputs), adapted(*inputs))
    _, inputs, _, adapted = ready("cross")
    adapted.add_adapter(spec)
    adapted.train()
    with pytest.raises(AdapterError, match=r"E420.*attn\.in_proj_weight"):
        adapted(*inputs)
