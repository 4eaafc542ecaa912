"""Adapters on bases that bitsandbytes quantized: PEFT's outputs and gradients on the same packed weights."""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from peftc.compiler.api import adapt
from peftc.passes.quantized.schemes.known import packed_modules
from tests.matrix import wide

SIZES = dict(vocab_size=128, hidden_size=64, num_attention_heads=4, num_hidden_layers=1, pad_token_id=0)
NO_DROPOUT = dict(dropout=0.0, attention_dropout=0.0)
T5_SIZES = dict(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, dropout_rate=0.0)

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SIZES, **NO_DROPOUT, ffn_dim=96, word_embed_proj_dim=64)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5_SIZES, decoder_start_token_id=0, eos_token_id=None)),
}
# The last of each is the feed-forward one; T5's `wo` is left dense by transformers, so that an adapter has both.
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "opt": ("q_proj", "v_proj", "fc2"), "t5": ("q", "v", "wi", "wo")}

KINDS: dict[str, dict[str, Any]] = {
    "int8": dict(load_in_8bit=True),
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "nf4 twice": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}
BFLOAT16 = "nf4 in bfloat16"  # the model in float32, its packed linears in bfloat16


@dataclass(frozen=True)
class Method:
    """PEFT's configuration and ours."""

    config: type[peft.PeftConfig]
    spec: str
    fields: dict[str, Any] = field(default_factory=dict)
    std: float = 0.1

    def theirs(self, targets: tuple[str, ...]) -> peft.PeftConfig:
        """PEFT's configuration."""
        more = dict(feedforward_modules=[targets[-1]]) if self.config is peft.IA3Config else {}
        return self.config(target_modules=list(targets), **self.fields, **more)

    def ours(self, targets: tuple[str, ...]) -> str:
        """Our spec."""
        more = f"refine {targets[-1]} with feedforward = true" if self.config is peft.IA3Config else ""
        return f"adapter default = {self.spec} {{ on {', '.join(targets)} {more} }}"


METHODS = {
    "lora": Method(peft.LoraConfig, "lora(rank = 4, alpha = 10)", dict(r=4, lora_alpha=10)),
    "ia3": Method(peft.IA3Config, "ia3", std=0.3),
    "dora": Method(peft.LoraConfig, "dora(rank = 4, alpha = 10)", dict(r=4, lora_alpha=10, use_dora=True)),
    "loha": Method(peft.LoHaConfig, "loha(rank = 4, alpha = 10)", dict(r=4, alpha=10)),
    "oft": Method(peft.OFTConfig, "oft(block = 8)", dict(oft_block_size=8)),
    "vera": Method(peft.VeraConfig, "vera(rank = 6)", dict(r=6), std=0.3),
}

PEFT = "peft"
Outcome = dict[str, torch.Tensor]
NO_SCALES = "PEFT loses the scales of an 8-bit weight when it asks for its value: the second call fails"
NOT_UNPACKED = "PEFT adds a matrix to 4-bit weights as they are stored: every call fails"
# What a cell is compared with: PEFT on the same packed weights, or, where it fails for the reason given, PEFT on a
# model that holds the values of the packed weights in dense linears.
ORACLES: dict[tuple[str, str], str] = {
    **{(method, kind): PEFT for method in METHODS for kind in (*KINDS, BFLOAT16)},
    ("dora", "int8"): NO_SCALES,
    **{("loha", kind): NOT_UNPACKED for kind in (*KINDS, BFLOAT16) if kind != "int8"},
}

MODES = ("train", "eval")
# Every way to store weights is seen on Llama. OPT adds biases and T5 an encoder and dense linears beside packed ones,
# which is the same for all four-bit types.
WIDEST = ("int8", "nf4 twice")
CELLS = [
    f"{mode}, {model}, {kind}, {method}"
    for mode in MODES
    for model in MODELS
    for kind in KINDS
    for method in METHODS
    if model == "llama" or kind in WIDEST
]
ALWAYS = (
    "train, llama, int8, lora",
    "train, llama, nf4, dora",
    "train, llama, fp4, vera",
    "train, opt, nf4 twice, ia3",
    "train, opt, int8, oft",
    "train, opt, nf4 twice, lora",
    "train, t5, int8, vera",
    "eval, llama, int8, dora",
    "eval, llama, int8, loha",
    "eval, llama, nf4 twice, loha",
)

# Relative to the largest number of a tensor. bitsandbytes, run twice, gives equal bits, and so do we where nothing is
# added up in another order than PEFT has it (IA3 and VeRA on Llama); float32 rounds by 1.2e-7 at every step.
OUTPUTS, GRADIENTS = 2e-6, 1e-5

# int8 rounds what it is given to 8 bits, and a last digit of float32 may fall to either side: one step of one number.
STEP = 5e-3


class Stored(nn.Linear):
    """A dense linear as PEFT sees it, which computes as the packed module does: where that rounds what it is given."""

    def __init__(self, module: nn.Module, weight: torch.Tensor):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = module.bias  # type: ignore[assignment]
        self.packed = (module,)  # in a tuple it is no child

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.packed[0].train(self.training)(input)


class Bases:
    """One architecture: its quantized models, and an adapted model of each kind. They share their traces."""

    def __init__(self, name: str, place: Path):
        self.name, self._place = name, place
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():  # biases and norms start at constants, which would hide mistakes
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(place)
        self._kind: Any = type(model)
        self._hosts: dict[str, tuple[Any, Any]] = {}
        self._traces: dict[Any, Any] = {}

    def quantized(self, kind: str) -> Any:
        """A model that bitsandbytes quantized, another one each time. It never repacks its weights."""
        settings = dict(KINDS["nf4" if kind == BFLOAT16 else kind])
        if kind != "int8":
            settings["bnb_4bit_compute_dtype"] = torch.bfloat16 if kind == BFLOAT16 else torch.float32
        config = hf.BitsAndBytesConfig(**settings)
        model = self._kind.from_pretrained(
            self._place, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        return model

    def dense(self, kind: str, *, rounding: bool) -> Any:
        """Such a model with the values of its packed weights in dense linears. `rounding`: see Stored."""
        model = self.quantized(kind)
        for name, held in packed_modules(model).items():
            module: nn.Module = Stored(held.module, held.unpack())
            if not rounding:
                module = nn.Linear(module.in_features, module.out_features, False)
                module.weight = nn.Parameter(held.unpack(), requires_grad=False)
                module.bias = held.module.bias
            model.set_submodule(name, module)
        for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method"):
            with contextlib.suppress(AttributeError):
                delattr(model, flag)
        return model

    def host(self, kind: str) -> tuple[Any, Any]:
        """A quantized model and an adapted model of it, the same each time."""
        if kind not in self._hosts:
            model = self.quantized(kind)
            adapted = adapt(model)
            adapted._adapter_state.engine._traces = self._traces  # a trace knows nothing of how weights are stored
            self._hosts[kind] = model, adapted
        return self._hosts[kind]

    def batch(self) -> dict[str, torch.Tensor]:
        """What every model is called with; the first row is padded."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, 128, (2, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        return {**batch, "decoder_input_ids": ids[:, 1:5]} if self.name == "t5" else batch


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bases]:
    """The models of this module by name."""
    found: dict[str, Bases] = {}

    def get(name: str) -> Bases:
        if name not in found:
            found[name] = Bases(name, tmp_path_factory.mktemp(name))
        return found[name]

    return get


@torch.no_grad()
def move(model: nn.Module, part: str, std: float) -> None:
    """Take whatever is trained far away from a start at which it does nothing."""
    generator = torch.Generator().manual_seed(2)
    found = [each for name, each in model.named_parameters() if part in name and each.requires_grad]
    assert found
    for each in found:
        each.add_(torch.randn(each.shape, generator=generator) * std)


def outcome(model: Any, batch: dict[str, torch.Tensor], place: Path) -> Outcome:
    """The output of a call, and the gradient of every trained tensor under the name that it has in a checkpoint."""
    output = model(**batch).logits
    output.square().sum().backward()
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.copy_(each.grad)  # saved as though it were the tensor
    model.save_pretrained(place)
    return {"output": output.detach(), **load_file(place / "adapter_model.safetensors")}


def distance(found: Outcome, wanted: Outcome, names: Collection[str] = ()) -> float:
    """The largest difference in a tensor, of all or of those named, relative to the largest number of it."""
    assert found.keys() == wanted.keys()
    assert all(each.abs().max() > 0 for each in wanted.values())
    keys = names or wanted
    return max(float((found[each] - wanted[each]).abs().max() / wanted[each].abs().max()) for each in keys)


@dataclass(frozen=True)
class Cell:
    """A method on one kind of quantized weights, in training or evaluation mode."""

    mode: str
    kind: str
    method: str
    bases: Bases

    def base(self, kind: str) -> Any:
        """What PEFT is given."""
        if ORACLES[self.method, kind] == PEFT:
            return self.bases.quantized(kind)
        return self.bases.dense(kind, rounding=(kind, self.mode) == ("int8", "eval") or kind == BFLOAT16)

    def theirs(self, checkpoint: Path, kind: str) -> Outcome:
        """What PEFT makes of a checkpoint."""
        model = peft.PeftModel.from_pretrained(self.base(kind), checkpoint, is_trainable=True)
        return outcome(model.train(self.mode == "train"), self.bases.batch(), checkpoint / f"gradients of peft, {kind}")

    def ours(self, checkpoint: Path) -> Outcome:
        """What we make of it."""
        model, adapted = self.bases.host(self.kind)
        adapted.load_adapter(checkpoint, "default", is_trainable=True)
        try:
            found = outcome(adapted.train(self.mode == "train"), self.bases.batch(), checkpoint / "gradients")
        finally:
            adapted.delete_adapter("default")
        with torch.no_grad():
            plain = model.train(self.mode == "train")(**self.bases.batch()).logits
        assert (found["output"] - plain).abs().max() > 1e-2 * plain.abs().max(), "the adapter does something"
        return found

    def checkpoints(self, place: Path) -> tuple[Path, Path]:
        """One from PEFT and one from us, both away from where the method starts."""
        torch.manual_seed(3)
        method, targets = METHODS[self.method], TARGETS[self.bases.name]
        theirs = peft.get_peft_model(self.base(self.kind), method.theirs(targets))
        move(theirs, theirs.base_model.prefix, method.std)
        theirs.save_pretrained(place / "theirs")
        _, adapted = self.bases.host(self.kind)
        adapted.add_adapter(method.ours(targets))
        move(adapted, "adapter_bank", method.std)
        adapted.save_pretrained(place / "ours")
        adapted.delete_adapter("default")
        return place / "theirs", place / "ours"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", wide(CELLS, ALWAYS))
def test_outputs_and_gradients(cell: str, bases: Callable[[str], Bases], tmp_path: Path) -> None:
    mode, model, kind, method = cell.split(", ")
    case = Cell(mode, kind, method, bases(model))
    for checkpoint in case.checkpoints(tmp_path):
        mine, its = case.ours(checkpoint), case.theirs(checkpoint, kind)
        assert distance(mine, its, ["output"]) < (STEP if kind == "int8" else OUTPUTS)
        assert distance(mine, its) < (10 * STEP if kind == "int8" else GRADIENTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", wide(MODES, MODES[:1]))
@pytest.mark.parametrize("method", wide(METHODS, ("lora",)))
def test_in_bfloat16(method: str, mode: str, bases: Callable[[str], Bases], tmp_path: Path) -> None:
    """Where packed linears round their input, a last digit of float32 may fall to either side of a rounding.

    So the two may be further apart than sums in another order, but no further than either is from what is not rounded.
    """
    case = Cell(mode, BFLOAT16, method, bases("llama"))
    for checkpoint in case.checkpoints(tmp_path):
        mine, its, exact = case.ours(checkpoint), case.theirs(checkpoint, BFLOAT16), case.theirs(checkpoint, "nf4")
        rounding = distance(its, exact)
        assert distance(mine, its) < rounding / 2
        assert distance(mine, exact) > rounding / 2, "we round as well"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "kind"), [each for each, oracle in ORACLES.items() if oracle != PEFT])
def test_where_peft_fails(method: str, kind: str, bases: Callable[[str], Bases]) -> None:
    """Why a cell is not compared with PEFT on packed weights is still so."""
    made = bases("llama")
    theirs = peft.get_peft_model(made.quantized(kind), METHODS[method].theirs(TARGETS["llama"])).train()
    move(theirs, theirs.base_model.prefix, METHODS[method].std)
    if ORACLES[method, kind] == NO_SCALES:
        layer = theirs.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer
        theirs(**made.batch())
        assert (layer.weight.CB is not None, layer.weight.SCB) == (True, None)  # and the next call takes both from it
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
            theirs(**made.batch())
    else:
        assert ORACLES[method, kind] == NOT_UNPACKED
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            theirs(**made.batch())
