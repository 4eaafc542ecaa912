"""Finds modules that a quantization library made and no scheme here knows."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.quantized.schemes.known import known_schemes, packed
from peftc.passes.quantized.schemes.torchao import is_torchao, refusal

# Packages whose modules hold quantized weights, and files of transformers and torch that are alike.
LIBRARIES = (
    "aqlm",
    "auto_gptq",
    "auto_round",
    "autoround",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "fouroversix",
    "fp_quant",
    "gptqmodel",
    "hqq",
    "neural_compressor",
    "optimum.quanto",
    "quanto",
    "quark",
    "sinq",
    "spqr_quant",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.quantized",
    "torchao",
    "transformer_engine",
    "vptq",
    *(
        f"transformers.integrations.{each}"
        for each in (
            "bitnet",
            "compressed_tensors",
            "eetq",
            "fbgemm_fp8",
            "finegrained_fp8",
            "gemma_quant",
            "gguf",
            "higgs",
            "metal_quantization",
            "mxfp4",
            "nvfp4",
        )
    ),
)


@dataclass(frozen=True)
class Foreign:
    """A module whose weight must not be read as a dense matrix, and nobody here knows how else to."""

    module: str
    what: str  # "QuantLinear of gptqmodel"


def foreign_modules(model: nn.Module) -> tuple[Foreign, ...]:
    """The outermost of them, in the model's order."""
    found: list[Foreign] = []
    for name, module in model.named_modules():
        if found and name.startswith(f"{found[-1].module}."):
            continue
        what = _what(module)
        if what and packed(module) is None:
            found.append(Foreign(name, what))
    return tuple(found)


def check_quantization(model: nn.Module) -> None:
    """Raise ModelError if a weight of the model is quantized in a way that no scheme here knows."""
    found = foreign_modules(model)
    if not found:
        return
    kinds = list(dict.fromkeys(each.what for each in found))
    names = [each.module or "the model" for each in found]
    some = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    count = "1 module is" if len(names) == 1 else f"{len(names)} modules are"
    schemes = ", ".join(each.name for each in known_schemes())
    fail(
        ModelError,
        "E407",
        f"{count} quantized in a way that peftc has no backend for: {'; '.join(kinds)} ({some})",
        help="dequantize the model, load it unquantized, or quantize it in a way that is known here\n"
        f"(the schemes are {schemes}); docs/own-scheme.md shows how one file adds another",
    )


def _what(module: nn.Module) -> str:
    own = [*module._parameters.values(), *module._buffers.values()]
    held: list[Any] = [each for each in own if each is not None]
    for each in held:
        if is_torchao(each):
            return f"{type(each).__name__} of torchao, {refusal(each) or f'in a {type(module).__name__}'}"
    if getattr(module, "quantization_scheme", None) is not None and isinstance(module, nn.Linear):
        return f"{type(module).__name__} of compressed_tensors"
    kind: Any = type(module)  # a class is hashable, whatever mypy says
    library = _library(kind)
    if not library or (library == "bitsandbytes" and all(_is_plain(each) for each in held)):
        return ""
    if library == "bitsandbytes" and type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
        return f"{type(module).__name__} of bitsandbytes that is not quantized yet, or keeps float16 weights"
    return f"{type(module).__name__} of {library}" if held or library.startswith("torch.") else ""


@lru_cache(maxsize=256)
def _library(kind: type) -> str:
    for each in kind.__mro__:
        for library in LIBRARIES:
            if f"{each.__module__}.".startswith(f"{library}."):
                return library
    return ""


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_floating_point()
