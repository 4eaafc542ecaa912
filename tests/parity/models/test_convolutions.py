"""Every method on convolutions: against peft where peft is right, and against its merged weights where it is not."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.loha import layer as loha_layer
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.grammar.diagnostics import AdapterError

ALL = ("line", "plane", "solid", "point", "head")
NO_SOLID = ("line", "plane", "point", "head")  # where peft has no Conv3d
PLANES = ("plane", "point", "head")


@dataclass(frozen=True)
class Way:
    """A method as a spec says it and as peft configures it, and the modules peft has it for.

    `square` is for what peft takes every kernel to be; `start` is how near the base a start is that rounding moves.
    """

    spec: str
    config: Callable[..., peft.PeftConfig]
    targets: tuple[str, ...]
    square: bool = False
    start: float = 0.0

    def adapter(self, targets: tuple[str, ...] | None = None) -> str:
        return f"adapter a = {self.spec} {{ on {', '.join(self.targets if targets is None else targets)} }}"


WAYS = {
    "lora": Way("lora(rank = 2, alpha = 6)", lambda **k: peft.LoraConfig(r=2, lora_alpha=6, **k), ALL),
    "dora": Way("dora(rank = 2, alpha = 6)", lambda **k: peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, **k), ALL),
    "loha": Way("loha(rank = 2, alpha = 6)", lambda **k: peft.LoHaConfig(r=2, alpha=6, **k), NO_SOLID),
    "loha effective": Way(
        "loha(rank = 2, alpha = 6, effective = true)",
        lambda **k: peft.LoHaConfig(r=2, alpha=6, use_effective_conv2d=True, **k),
        NO_SOLID,
    ),
    "hira": Way("hira(rank = 2)", lambda **k: peft.HiraConfig(r=2, **k), ALL),
    "adalora": Way(
        "adalora(rank = 2, target = 1, alpha = 6, steps = 9)",
        lambda **k: peft.AdaLoraConfig(init_r=2, target_r=1, lora_alpha=6, total_step=9, **k),
        PLANES,
    ),
    "lokr": Way("lokr(rank = 1, alpha = 3)", lambda **k: peft.LoKrConfig(r=1, alpha=3, **k), NO_SOLID),
    "lokr full": Way("lokr(rank = 8, alpha = 9)", lambda **k: peft.LoKrConfig(r=8, alpha=9, **k), NO_SOLID),
    "lokr effective": Way(  # at a Conv1d peft stops with an error
        "lokr(rank = 1, alpha = 3, both = true, effective = true)",
        lambda **k: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, use_effective_conv2d=True, **k),
        PLANES,
    ),
    "ia3": Way("ia3", lambda **k: peft.IA3Config(feedforward_modules=[], **k), ("plane", "solid", "point", "head")),
    "ia3 of inputs": Way(
        "ia3(feedforward = true)",
        lambda **k: peft.IA3Config(feedforward_modules=k["target_modules"], **k),
        ("plane", "solid", "point", "head"),
    ),
    # Peft turns what larger kernels see as if places did not overlap.
    "oft": Way("oft(block = 4)", lambda **k: peft.OFTConfig(oft_block_size=4, **k), ("point", "head")),
    "boft": Way("boft(block = 4)", lambda **k: peft.BOFTConfig(boft_block_size=4, **k), PLANES, square=True),
    "hra": Way("hra(rank = 2)", lambda **k: peft.HRAConfig(r=2, **k), PLANES, square=True, start=1e-5),
}
FEW = ("lora", "dora", "loha", "hira")


class Net(nn.Module):
    """Convolutions of one, two and three axes; `options` go to all but the 1 x 1."""

    def __init__(self, square: bool = False, **options: object) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, padding="same", **options)
        self.plane = nn.Conv2d(6, 8, 2 if square else (3, 2), stride=2, padding=1, **options)
        self.solid = nn.Conv3d(8, 4, (1, 2, 2), padding=(0, 1, 1), **options)
        self.point = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = torch.relu(self.line(x))
        seen = torch.relu(self.plane(seen[:, :, :, None] + seen[:, :, None, :]))
        seen = torch.relu(self.solid(seen[:, :, None]))[:, :, 0]
        return self.head(self.point(seen).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution of two groups and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.paired = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, padding_mode="reflect", bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(torch.tanh(self.paired(x)))


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights large enough for every method to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(1)


def randomised(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    return model


@functools.cache
def ready(square: bool = False, **options: object) -> tuple[nn.Module, compiler.AdaptedModel]:
    """A model, and an adapted model of it that tests put their adapters into: one trace serves them all."""
    model = made(Net(square, **options))
    return model, adapt(model)


@functools.cache
def ready_groups() -> tuple[nn.Module, compiler.AdaptedModel]:
    model = made(Grouped())
    return model, adapt(model)


@pytest.fixture
def bench(way: str) -> Iterator[tuple[nn.Module, compiler.AdaptedModel]]:
    model, adapted = ready(WAYS[way].square)
    yield model, adapted
    cleared(adapted)


def cleared(adapted: compiler.AdaptedModel) -> None:
    if adapted._adapter_state.displaced:
        adapted.unmerge_adapter()
    adapted.delete_adapter(adapted._adapter_state.names())
    adapted.eval()


def theirs(way: Way, model: nn.Module, directory: Path, targets: tuple[str, ...] | None = None) -> nn.Module:
    names = list(way.targets if targets is None else targets)
    wrapped = peft.get_peft_model(copy.deepcopy(model), way.config(target_modules=names)).eval()
    randomised(wrapped, wrapped.base_model.prefix)
    wrapped.save_pretrained(directory)
    return wrapped


def products(
    t1: torch.Tensor,
    a1: torch.Tensor,
    b1: torch.Tensor,
    t2: torch.Tensor,
    a2: torch.Tensor,
    b2: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """What peft's HadaWeightCP computes. In its own gradient the factors of one product stand for the other's."""
    first, second = (torch.einsum("ijkl,jr,ip->prkl", *each) for each in ((t1, b1, a1), (t2, b2, a2)))
    return first * second * scale


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_both_ways(way: str, bench: tuple[nn.Module, compiler.AdaptedModel], tmp_path: Path) -> None:
    model, adapted = bench
    x = torch.randn(3, 4, 9)
    wrapped = theirs(WAYS[way], model, tmp_path / "theirs")
    adapted.load_adapter(tmp_path / "theirs", "loaded")
    with torch.no_grad():
        base, expected = model(x), wrapped(x)
        close(adapted(x), expected)
        assert (expected - base).abs().max() > 1e-2

        adapted.add_adapter(WAYS[way].adapter(), "ours")
        assert (adapted(x) - base).abs().max() <= WAYS[way].start
        randomised(adapted, "adapter_bank.ours")
        adapted.save_pretrained(tmp_path, selected_adapters=["ours"])
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        close(back(x), adapted(x))
        adapted.merge_adapter()
        close(adapted(x), back(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_pefts(
    training: bool,
    way: str,
    bench: tuple[nn.Module, compiler.AdaptedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loha_layer, "make_weight_cp", products)
    model, adapted = bench
    x = torch.randn(3, 4, 9)
    wrapped = theirs(WAYS[way], model, tmp_path).train(training)
    adapted.load_adapter(tmp_path, "loaded", is_trainable=True)
    adapted.train(training)
    for each in (wrapped, adapted):
        each(x).square().sum().backward()
    ours = sorted(float(each.grad.norm()) for each in adapted.parameters() if each.requires_grad)
    its = sorted(float(each.grad.norm()) for each in wrapped.parameters() if each.requires_grad)
    assert_close(torch.tensor(ours), torch.tensor(its), rtol=1e-4, atol=1e-5)
    assert min(ours) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [each for each in WAYS if each != "oft"])
@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_peft_is_right_only_once_merged_where_it_drops_an_option(
    options: dict[str, object], way: str, tmp_path: Path
) -> None:
    """Its LoRA forgets the dilation, and nearly every method the padding mode; its merged weights do not."""
    model, adapted = ready(WAYS[way].square, **options)
    x = torch.randn(3, 4, 12)
    wrapped = theirs(WAYS[way], model, tmp_path)
    adapted.load_adapter(tmp_path, "loaded")
    try:
        with torch.no_grad():
            got = adapted(x)
            close(got, wrapped.merge_and_unload()(x))
            assert (got - model(x)).abs().max() > 1e-2
    finally:
        cleared(adapted)


@pytest.mark.filterwarnings("ignore")
def test_pefts_rotation_of_a_kernel_is_right_only_once_merged(tmp_path: Path) -> None:
    """It turns what overlapping places see and adds it up again, which is no convolution's weight turned."""
    model, adapted = ready(square=True)
    x = torch.randn(3, 4, 9)
    wrapped = theirs(WAYS["oft"], model, tmp_path, ("plane",))
    adapted.load_adapter(tmp_path, "loaded")
    try:
        with torch.no_grad():
            got = adapted(x)
            with pytest.raises(AssertionError):
                close(got, wrapped(x))
            close(got, wrapped.merge_and_unload()(x))
    finally:
        cleared(adapted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", FEW)
@pytest.mark.parametrize("options", [{}, {"dilation": 2, "padding_mode": "circular"}], ids=str)
def test_merged_is_unmerged(options: dict[str, object], way: str) -> None:
    model, adapted = ready(**options)
    x = torch.randn(3, 4, 12)
    adapted.add_adapter(WAYS[way].adapter(("line", "plane", "solid", "point")))
    randomised(adapted, "adapter_bank")
    try:
        with torch.no_grad():
            unmerged = adapted(x)
            assert (unmerged - model(x)).abs().max() > 1e-2
            adapted.merge_adapter(safe_merge=True)
            close(adapted(x), unmerged)
            adapted.unmerge_adapter()
            assert torch.equal(adapted(x), unmerged)
            plain = adapted.merge_and_unload()
            assert type(plain) is Net
            close(plain(x), unmerged)
            assert plain.plane.weight.shape == model.plane.weight.shape
    finally:
        cleared(adapted)


@pytest.mark.parametrize("way", FEW)
def test_groups(way: str, tmp_path: Path) -> None:
    """Peft cannot merge LoRA there, and has no HiRA: its adapters of a group see the channels of all."""
    model, adapted = ready_groups()
    x = torch.randn(2, 4, 7, 6)
    adapted.add_adapter(f"adapter a = {WAYS[way].spec} {{ on all conv2d }}")
    try:
        with torch.no_grad():
            assert torch.equal(adapted(x), model(x))
            randomised(adapted, "adapter_bank")
            unmerged = adapted(x)
            assert (unmerged - model(x)).abs().max() > 1e-2
            close(adapted.merge_and_unload()(x), unmerged)
        adapted.train()
        close(adapted(x).detach(), unmerged)
        adapted(x).square().sum().backward()
        assert all(float(each.grad.abs().max()) > 0 for each in adapted.parameters() if each.requires_grad)
        adapted.save_pretrained(tmp_path)
        adapted.load_adapter(tmp_path, "loaded")
        adapted.set_adapter("loaded")
        with torch.no_grad():
            close(adapted.eval()(x), unmerged)
    finally:
        cleared(adapted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["loha", "loha effective", "lokr", "lokr effective", "ia3"])
def test_groups_are_pefts(way: str, tmp_path: Path) -> None:
    model, adapted = ready_groups()
    x = torch.randn(2, 4, 7, 6)
    wrapped = theirs(WAYS[way], model, tmp_path, ("paired",))
    adapted.load_adapter(tmp_path, "loaded")
    try:
        with torch.no_grad():
            close(adapted(x), wrapped(x))
            assert (wrapped(x) - model(x)).abs().max() > 1e-2
    finally:
        cleared(adapted)


@pytest.mark.filterwarnings("ignore")
def test_pefts_lora_of_groups_is_refused(tmp_path: Path) -> None:
    model = made(Grouped())
    wrapped = peft.get_peft_model(copy.deepcopy(model), WAYS["lora"].config(target_modules=["paired"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="every group of a convolution reads the channels of all"):
        compiler.load(model, tmp_path)


@pytest.mark.parametrize("method", ["lora(rank = 2, dropout = 0.5)", "hira(rank = 2, dropout = 0.5)"])
@pytest.mark.parametrize("make", [Net, Grouped])
def test_dropout_of_the_inputs(make: type[nn.Module], method: str) -> None:
    """While training the adapter's part is noisy, and unbiased: the mean is what evaluation gives."""
    model = made(make())
    site = "line" if make is Net else "paired"
    x = torch.randn(1, 4, 9) if make is Net else torch.randn(1, 4, 5, 5)
    bare = nn.Sequential()
    bare.add_module(site, model.get_submodule(site))
    adapted = randomised(compiler.apply(bare, f"adapter a = {method} {{ on {site} }}"), "adapter_bank")
    with torch.no_grad():
        expected = adapted.eval()(x)
        runs = torch.stack([adapted.train()(x) for _ in range(1500)])
    assert float(runs.var(0).max()) > 1e-3
    error = runs.std(0) / 1500**0.5
    assert float(((runs.mean(0) - expected).abs() / (error + 1e-4)).max()) < 6


def test_a_low_precision_base_keeps_what_the_adapter_adds() -> None:
    """A change too small for bfloat16's weights still reaches the output, as at a linear."""
    layer = nn.Sequential()
    layer.add_module("conv", nn.Conv2d(2, 1, 1, bias=False))
    layer.conv.weight = nn.Parameter(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
    adapted = compiler.apply(layer.to(torch.bfloat16).eval(), "adapter a = lora(rank = 1, alpha = 1) { on conv }")
    parts = {name[-1]: each for name, each in adapted.named_parameters() if each.requires_grad}
    with torch.no_grad():
        parts["A"].copy_(torch.tensor([[2.0**-6, 0.0]]))
        parts["B"].fill_(2.0**-6)
        got = adapted(torch.ones(1, 2, 3, 3, dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.full_like(got, 2.0**-12))


def test_two_adapters_at_one_convolution() -> None:
    model, x = made(Net()), torch.randn(3, 4, 9)
    spec = "adapter a = lora(rank = 2) { on plane } adapter b = hira(rank = 2) { on plane } activate a + b"
    adapted = randomised(compiler.apply(model, spec), "adapter_bank").eval()
    state = {name: each.detach().flatten(1) for name, each in adapted.named_parameters() if "adapter_bank" in name}
    parts = {name.removeprefix("adapter_bank."): each for name, each in state.items()}
    with torch.no_grad():
        first = model.plane.weight.flatten(1) + 4 * parts["a.plane.B"] @ parts["a.plane.A"]
        second = first + first * (parts["b.plane.B"] @ parts["b.plane.A"])
        expected = copy.deepcopy(model)
        expected.plane.weight.copy_(second.view_as(model.plane.weight))
        close(adapted(x), expected(x))


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model, x = made(Net()), torch.randn(3, 4, 9)
    adapted = randomised(compiler.apply(model, "adapter a = lora(rank = 2) { on line, plane }"), "adapter_bank").eval()
    with torch.no_grad():
        close(torch.compile(adapted, fullgraph=True, backend="eager", dynamic=True)(x), adapted(x))
    torch._dynamo.reset()
