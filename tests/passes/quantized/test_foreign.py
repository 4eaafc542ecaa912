"""Modules of quantization libraries that no scheme knows: found before anything is traced, and said by name."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers.integrations.bitnet import AutoBitLinear, BitLinear
from transformers.integrations.eetq import EetqLinear

from peftc import compiler
from peftc.grammar.diagnostics import ModelError
from peftc.passes.quantized.foreign import check_quantization, foreign_modules
from tests.passes.quantized.storages import STORES


def made_by(module: str, name: str = "QuantLinear", base: type[nn.Module] = nn.Module) -> nn.Module:
    """A module as a library that is not here would make: packed numbers and scales."""
    made = type(name, (base,), {"__module__": module})()
    made.register_buffer("qweight", torch.zeros(4, 2, dtype=torch.int32))
    made.register_buffer("scales", torch.ones(2))
    return made


def ao(config: object, module: nn.Module | None = None) -> nn.Module:
    made = module or nn.Linear(64, 32)
    quantize_(made, config, filter_fn=lambda each, _: isinstance(each, nn.Linear | nn.Embedding))  # type: ignore[arg-type]
    return made


def scheme_of_compressed_tensors() -> nn.Module:
    made = nn.Linear(4, 4)
    made.quantization_scheme = object()
    return made


FOREIGN = {
    "QuantLinear of gptqmodel": lambda: made_by("gptqmodel.nn_modules.qlinear.torch"),
    "WQLinear_GEMM of awq": lambda: made_by("awq.modules.linear.gemm", "WQLinear_GEMM"),
    "QuantLinear of auto_gptq": lambda: made_by("auto_gptq.nn_modules.qlinear"),
    "QLinear of optimum.quanto": lambda: made_by("optimum.quanto.nn.qlinear", "QLinear"),
    "QuantizedLinear of aqlm": lambda: made_by("aqlm.inference", "QuantizedLinear"),
    "Own of gptqmodel": lambda: made_by("mine", "Own", type(made_by("gptqmodel.nn_modules.qlinear"))),
    "Linear of compressed_tensors": scheme_of_compressed_tensors,
    "EetqLinear of transformers.integrations.eetq": lambda: EetqLinear(4, 4),
    "BitLinear of transformers.integrations.bitnet": lambda: BitLinear(8, 8, bias=False),
    "AutoBitLinear of transformers.integrations.bitnet": lambda: AutoBitLinear(8, 8),
    "Linear of torch.ao.nn.quantized": lambda: torch.ao.nn.quantized.dynamic.Linear(4, 4),
    "Linear4bit of bitsandbytes that is not quantized yet": lambda: bnb.nn.Linear4bit(4, 4),
    "Linear8bitLt of bitsandbytes that is not quantized yet, or keeps": lambda: bnb.nn.Linear8bitLt(4, 4),
    "Embedding8bit of bitsandbytes": lambda: bnb.nn.Embedding8bit(64, 64),
    "Int8Tensor of torchao, which changes the activation too": lambda: ao(Int8DynamicActivationInt8WeightConfig()),
    "IntxUnpackedToInt8Tensor of torchao, which changes the activation too": lambda: ao(
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    ),
    "Int8Tensor of torchao, in a Embedding": lambda: ao(Int8WeightOnlyConfig(), nn.Embedding(8, 64)),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_no_scheme_knows(what):
    model = nn.ModuleDict(
        {"plain": nn.Linear(4, 4), "odd": FOREIGN[what](), "packed": STORES["nf4"](nn.Linear(64, 64))}
    )
    (found,) = foreign_modules(model)
    assert found.module == "odd"
    assert found.what.startswith(what)


@pytest.mark.parametrize("name", STORES)
def test_what_a_scheme_knows(name):
    check_quantization(nn.ModuleDict({"own": STORES[name](nn.Linear(64, 64))}))


def test_what_only_looks_like_it():
    mine = type("Linear4bit", (nn.Linear,), {"__module__": "my.bitsandbytes"})(2, 2)
    model = nn.ModuleDict({"mine": mine, "stable": bnb.nn.StableEmbedding(4, 4), "embed": bnb.nn.Embedding(4, 4)})
    norm = type("Norm", (nn.Module,), {"__module__": "awq_kernels"})()
    norm.register_buffer("scale", torch.ones(2))
    model["norm"] = norm
    check_quantization(model)


@pytest.mark.parametrize("enter", [compiler.apply, compiler.load], ids=["apply", "load"])
def test_the_message(enter):
    layers = nn.ModuleList(
        nn.ModuleDict({"q": made_by("gptqmodel.nn_modules.qlinear"), "k": nn.Linear(2, 2)}) for _ in range(3)
    )
    layers[0]["q"].inner = made_by("gptqmodel.nn_modules.qlinear")  # of which it is made
    model = nn.ModuleDict({"layers": layers, "head": ao(Int8DynamicActivationInt8WeightConfig())})
    with pytest.raises(ModelError) as caught:
        enter(model, "adapter a = lora { on k }")
    first, help, more = str(caught.value).splitlines()
    assert first.startswith("error[E407]: 4 modules are quantized in a way that peftc has no backend for: ")
    assert "QuantLinear of gptqmodel; Int8Tensor of torchao, which changes the activation too, without a" in first
    assert first.endswith("(layers.0.q, layers.1.q, ...)")
    assert help.startswith("  help: dequantize the model, load it unquantized, or quantize it in a way that is known")
    assert "(the schemes are bitsandbytes-4bit, bitsandbytes-8bit, torchao, hqq); docs/own-scheme.md" in more


def test_a_model_that_is_one():
    with pytest.raises(ModelError, match=r"E407.*1 module is quantized .*gptqmodel \(the model\)"):
        compiler.apply(made_by("gptqmodel.nn_modules.qlinear"), "adapter a = lora { on all linear }")
