"""Stores a base as a spec says: as transformers loads it, or a model that is in memory already."""

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from peftc.compiler.load_model.memory import release
from peftc.grammar.diagnostics import ModelError, SpecError, did_you_mean, fail
from peftc.grammar.spec.quantize import text
from peftc.grammar.spec.spec import COMPUTE_TYPES, Quantize
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.sites import tied_names
from peftc.passes.quantized.foreign import check_quantization
from peftc.passes.quantized.schemes.known import Packed, packed_modules
from peftc.runtime.base.share import share

INSTALL = 'pip install "bitsandbytes>=0.50" "accelerate>=1.10"'


def quantize_linears(model: nn.Module, quantize: Quantize) -> bool:
    """Store a model's linears packed, one after the other, in new modules. False if they are packed so already.

    What stays dense is what transformers leaves dense: the output head, whatever is tied, what the model wants in
    float32; of a module that is not transformers' own, what is tied. The model is marked as transformers marks those it
    quantizes itself, so that it can be saved and trained.

    Raises:
        SpecError: the model is quantized in another way, has no module that is to be skipped, or no linears.
        ModelError: bitsandbytes is not installed, or the model is of a type that it does not know.
    """
    if is_packed(model):
        check_same(model, quantize)
        return False
    library = backend()
    compute = _compute_type(model, quantize)
    explicit, dense = left_dense(model, quantize)
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and _is_linear(module) and should_convert_module(name, list(dense)):
            if module not in made:
                made[module] = _packed(library, module, quantize, compute)
            model.set_submodule(name, made[module])
            release()
    if not made:
        message = f"this {type(model).__name__} has no linears to quantize"
        fail(SpecError, "E245", message, quantize.span, f"left dense: {', '.join(sorted(dense))}" if dense else "")
    _mark(model, config_of(quantize, compute, explicit), dense)
    return True


def quantized_copy(model: nn.Module, quantize: Quantize | None) -> nn.Module:
    """The model if its linears are packed as they are to be, or need not be; a packed copy otherwise.

    Raises SpecError and ModelError as `quantize_linears`.
    """
    if quantize is None:
        return model
    if is_packed(model):
        check_same(model, quantize)
        return model
    copied = share(model, requires_grad=False)
    quantize_linears(copied, quantize)
    return copied


def config_of(quantize: Quantize, compute: torch.dtype | None, skip: Sequence[str] | None) -> BitsAndBytesConfig:
    """What transformers takes to load a model so; `compute` None is for its own default, float32."""
    left = None if skip is None else list(skip)
    if quantize.scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantize.threshold, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize.scheme,
        bnb_4bit_use_double_quant=quantize.double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=left,
    )


def left_dense(model: nn.Module, quantize: Quantize) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """What a config names as not to be packed, None for transformers' own choice, and all that stays dense.

    Of the model only the structure matters. Raises SpecError for modules to skip that there are not.
    """
    explicit = None
    if quantize.skip is not None:
        skipped = [name for each in quantize.skip for name in _skipped(model, each, quantize)]
        explicit = tuple(dict.fromkeys((*skipped, *_tied_modules(model))))
    chosen = set(_left_by_default(model) if explicit is None else explicit)
    return explicit, tuple(sorted(chosen | set(getattr(model, contract.IN_FLOAT32, None) or ())))


def settle_compute_type(model: nn.Module, quantize: Quantize) -> None:
    """Have the linears of a model that was just loaded compute in its own type, if the spec names no other."""
    if quantize.compute is not None or quantize.scheme == "int8":
        return
    kind = _compute_type(model, quantize)
    for held in packed_modules(model).values():
        own: Any = held.module
        own.compute_dtype = kind
    config: Any = getattr(model, "config", None)
    written = getattr(config, contract.QUANTIZATION, None)
    if isinstance(written, BitsAndBytesConfig):
        written.bnb_4bit_compute_dtype = kind


def backend() -> Any:
    """bitsandbytes. Raises ModelError if it is not installed."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of faster operators that it could have loaded
    try:
        return import_module("bitsandbytes")
    except ImportError:
        fail(ModelError, "E460", "a base is quantized by bitsandbytes, which is not installed", help=INSTALL)
    finally:
        logger.setLevel(level)


# --- models that are quantized already ---


def is_packed(model: nn.Module) -> bool:
    """Whether any of a model's weights is stored packed. Raises ModelError if one is in a way unknown here."""
    check_quantization(model)
    return bool(packed_modules(model))


def check_same(model: nn.Module, quantize: Quantize) -> None:
    """Raise SpecError unless a quantized model is stored as a spec says.

    A type to compute in that the spec does not name may be any; so may what is left dense.
    """
    found = {_found(held) for held in packed_modules(model).values()}
    if any(isinstance(each, str) or not _agrees(each, quantize) for each in found):
        shown = " and ".join(sorted(each if isinstance(each, str) else text(each) for each in found))
        message = f"this spec is for a base in {text(quantize)}, and the model is in {shown}"
        help = "load the model dense to have it quantized, or leave 'quantize' out"
        fail(SpecError, "E244", message, quantize.span, help)
    skipped = [name for each in quantize.skip or () for name in _skipped(model, each, quantize)]
    for name in packed_modules(model):
        if not should_convert_module(name, skipped):
            message = f"this spec leaves {name} dense, and in the model it is quantized"
            fail(SpecError, "E244", message, quantize.span, "load the model dense to have it quantized")


def check_stored(model: nn.Module, quantize: Quantize) -> None:
    """Raise SpecError unless a model is quantized already, and as a spec says."""
    if not is_packed(model):
        message = f"this spec is for a base in {text(quantize)}, and the model is dense"
        fail(
            SpecError, "E244", message, quantize.span, "quantize the model when it is adapted, or leave 'quantize' out"
        )
    check_same(model, quantize)


def check_is_backed(model: nn.Module) -> None:
    """Raise ModelError for a model that transformers says is in HQQ's format, and whose weights it has drawn."""
    if str(getattr(getattr(model, contract.QUANTIZED_BY, None), "value", "")) == "hqq" and not is_packed(model):
        message = "transformers cannot read checkpoints of hqq: the weights of this model are random"
        fail(ModelError, "E462", message, help="load the model with the package hqq itself")


def description(model: nn.Module) -> str:
    """How a model is stored, in words; empty for a dense one."""
    held = packed_modules(model).values()
    if not held:
        return ""
    kinds = sorted({each if isinstance(each, str) else text(each) for each in map(_found, held)})
    stored = sum(part.numel() * part.element_size() for each in held for part in each.parts)
    dense = sum(each.packing.out_features * each.packing.in_features * each.packing.dtype.itemsize for each in held)
    count = f"{len(held)} {'linear' if len(held) == 1 else 'linears'}"
    return f"{count} in {' and '.join(kinds)}: {_size(stored)} instead of {_size(dense)}"


def _found(held: Packed) -> Quantize | str:
    packing = held.packing
    module: Any = held.module
    if packing.scheme == "bitsandbytes-8bit":
        return Quantize("int8", threshold=float(packing.settings["threshold"]))
    if packing.scheme != "bitsandbytes-4bit" or packing.label not in ("nf4", "fp4"):
        return packing.label
    # A module that repacked itself for the CPU has unpacked its scales, and remembers.
    nested = bool(packing.settings["nested"]) or bool(getattr(module.weight.quant_state, "original_nested", False))
    compute: Any = None if packing.compute is None else str(packing.compute).removeprefix("torch.")
    return Quantize("nf4" if packing.label == "nf4" else "fp4", double_quant=nested, compute=compute)


def _agrees(found: Quantize, wanted: Quantize) -> bool:
    same = (found.scheme, found.double_quant) == (wanted.scheme, wanted.double_quant)
    threshold = wanted.scheme != "int8" or found.threshold == wanted.threshold
    return same and threshold and wanted.compute in (None, found.compute)


# --- packing ---


def _is_linear(module: nn.Module) -> bool:
    """Whether transformers' integration of bitsandbytes replaces modules like this one."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _packed(library: Any, module: nn.Module, quantize: Quantize, compute: torch.dtype) -> nn.Module:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    value = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    out_features, in_features = value.shape
    sizes = (in_features, out_features, bias is not None)
    made: Any
    if quantize.scheme == "int8":
        made = library.nn.Linear8bitLt(
            *sizes, has_fp16_weights=False, threshold=quantize.threshold, device=torch.device("meta")
        )
        # It packs what is on the CPU and is moved, and nothing else.
        stored = library.nn.Int8Params(value.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        kind = {"compress_statistics": quantize.double_quant, "quant_type": quantize.scheme}
        made = library.nn.Linear4bit(*sizes, compute, **kind, device=torch.device("meta"))
        made.support_avx512bf16_for_cpu = False  # it would repack itself, and lose what packing keeps
        stored = library.nn.Params4bit(value, requires_grad=False, module=made, **kind)
    made._parameters["weight"] = stored.to(weight.device)
    made._parameters["bias"] = bias
    made.source_cls = type(module)  # for transformers
    return made.requires_grad_(False).train(module.training)


def _mark(model: nn.Module, config: BitsAndBytesConfig, dense: Sequence[str]) -> None:
    """What transformers says of a model that it has loaded packed."""
    if not isinstance(model, PreTrainedModel):
        return
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.modules_to_not_convert = list(dense)
    said = {contract.QUANTIZED: True, contract.QUANTIZED_BY: config.quant_method, contract.QUANTIZER: quantizer}
    for name, value in said.items():
        setattr(model, name, value)
    quantizer.postprocess_model(model)


def _compute_type(model: nn.Module, quantize: Quantize) -> torch.dtype:
    own = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    if str(own).removeprefix("torch.") not in COMPUTE_TYPES:
        message = f"bitsandbytes quantizes no weights of type {str(own).removeprefix('torch.')}"
        fail(ModelError, "E463", message, help="convert the model first: model.to(torch.float32)")
    named: torch.dtype = own if quantize.compute is None else getattr(torch, quantize.compute)
    return named


def _left_by_default(model: nn.Module) -> set[str]:
    """As transformers' `get_keys_to_not_convert`, which is asked before anything is tied: that changes what is last."""
    if not isinstance(model, PreTrainedModel):
        return set(_tied_modules(model))
    *_, (last, _) = model.named_parameters(remove_duplicate=False)
    head = model.get_output_embeddings()
    heads = {name for name, each in model.named_modules() if head is not None and each is head}
    return {*_tied_modules(model), last.removesuffix(".weight"), *heads}


def _skipped(model: nn.Module, wanted: str, quantize: Quantize) -> tuple[str, ...]:
    """What to tell transformers for everything inside the modules of a name, whole or the end of one, to be left.

    The name as it is written if transformers understands it so, and otherwise those of the modules.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen = tuple(name for name in names if f".{name}".endswith(f".{wanted}"))
    if not chosen:
        help = did_you_mean(wanted, {leaf for name in names for leaf in (name, name.rpartition(".")[2])})
        fail(SpecError, "E246", f"there is no module '{wanted}' to leave dense", quantize.span, help)
    inside = {name for name in names if any(f"{name}.".startswith(f"{each}.") for each in chosen)}
    understood = {name for name in names if not should_convert_module(name, [wanted])}
    return (wanted,) if inside == understood else chosen


def _tied_modules(model: nn.Module) -> tuple[str, ...]:
    """Modules with a tensor that another one has, too."""
    if isinstance(model, PreTrainedModel):
        keys: dict[str, str] = getattr(model, contract.TIED, None) or {}
        return tuple(dict.fromkeys(each.removesuffix(".weight") for pair in keys.items() for each in pair))
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in tied_names(model)}
    groups = (names for names in tied_names(model).values() if len({id(owners[name]) for name in names}) > 1)
    return tuple(dict.fromkeys(name.rpartition(".")[0] for names in groups for name in names))


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
