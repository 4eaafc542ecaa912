"""How a checkpoint's weights are stored, looked at before they are loaded, and how they are to be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from peftc.compiler.load_model.quantizing import backend, config_of, left_dense, settle_compute_type
from peftc.grammar.diagnostics import Diagnostic, ModelError, did_you_mean, fail
from peftc.grammar.spec.spec import Quantize
from peftc.passes.foreign import transformers as contract

ON_CPU = {"": "cpu"}
_DENSE = "take a checkpoint that is not quantized, or that bitsandbytes has quantized"
_UNREADABLE = {  # transformers loads such a checkpoint, and not its weights
    "hqq": "transformers cannot read it, and would draw its weights at random",
    "gguf": "transformers reads a .gguf file, and no such directory",
}


@dataclass(frozen=True)
class Storing:
    """What transformers is told of how to store a model that it loads; `method` is what the checkpoint is in."""

    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    quantize: Quantize | None = None

    def check(self, error: Exception, where: str) -> None:
        """Raise ModelError for a failure to load that is for want of the checkpoint's backend."""
        if self.method and isinstance(error, ImportError | NotImplementedError):
            _refuse(self.method, error, where)

    def settle(self, model: nn.Module, missing: Sequence[str], where: str) -> None:
        """Look over what was loaded. Raises ModelError if weights of a quantized checkpoint were not read.

        What bitsandbytes has packed transformers reads or refuses itself; other libraries' it may draw at random.
        """
        if self.method not in ("", "bitsandbytes") and missing:
            message = f"this checkpoint is quantized with {self.method}, and transformers has not read {missing[0]}"
            rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            fail(ModelError, "E462", f"{message}{rest}", help=_DENSE, where=where)
        if self.quantize is not None:
            settle_compute_type(model, self.quantize)


def storing(
    config: Mapping[str, Any], kind: Any, path: Path, quantize: Quantize | None, where: str, trust_remote_code: bool
) -> Storing:
    """What a config.json and a spec say together; of a checkpoint that is quantized, the checkpoint decides.

    Raises:
        ModelError: the checkpoint is quantized in a way that nothing here can read, or bitsandbytes is not installed.
        SpecError: the model has no module that `quantize` skips.
    """
    written = config.get(contract.QUANTIZATION, config.get(contract.COMPRESSION))
    if written is not None:
        method = _checked(written, where)
        return Storing({"device_map": ON_CPU} if method == "bitsandbytes" else {}, method)
    if quantize is None:
        return Storing()
    backend()
    explicit = None
    if quantize.skip is not None:
        explicit, _ = left_dense(structure(kind, path, where, trust_remote_code), quantize)
    compute = None if quantize.compute is None else getattr(torch, quantize.compute)
    options = {contract.QUANTIZATION: config_of(quantize, compute, explicit), "device_map": ON_CPU}
    return Storing(options, quantize=quantize)


def _checked(written: Any, where: str) -> str:
    """The method that a checkpoint is quantized with, if it can be loaded here."""
    if not isinstance(written, dict):
        fail(ModelError, "E464", "field 'quantization_config' is not a JSON object", where=where)
    is_bitsandbytes = bool(written.get("load_in_4bit") or written.get("load_in_8bit"))
    method = "bitsandbytes" if is_bitsandbytes else written.get("quant_method")
    if not isinstance(method, str):
        message = "field 'quantization_config' has no 'quant_method', so it is not known how to read the weights"
        fail(ModelError, "E464", message, where=where)
    known = [each.value for each in QuantizationMethod]
    if method not in known and method not in AUTO_QUANTIZER_MAPPING:
        help = did_you_mean(method, known) or f"transformers {transformers.__version__} knows {', '.join(known)}"
        message = f"this checkpoint is quantized with {method!r}, which transformers does not know"
        fail(ModelError, "E461", message, help=help, where=where)
    if method in _UNREADABLE:
        message = f"this checkpoint is quantized with {method}; there is no backend for it on this machine"
        fail(ModelError, "E461", message, help=f"{_UNREADABLE[method]}\n{_DENSE}", where=where)
    if method == "bitsandbytes":
        backend()
    try:
        quantizer: Any = AutoHfQuantizer.from_config(dict(written), pre_quantized=True)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        _refuse(method, error, where)
    except Exception as error:  # every method's config has checks of its own
        message = f"field 'quantization_config' is wrong: {_first(error)}"
        raise ModelError(Diagnostic("E464", message, where=where)) from error
    try:
        quantizer.validate_environment(device_map=ON_CPU if method == "bitsandbytes" else None, weights_only=True)
    except Exception as error:  # and every one misses what it needs in its own way
        _refuse(method, error, where)
    return method


def _refuse(method: str, error: Exception, where: str) -> NoReturn:
    message = f"this checkpoint is quantized with {method}; there is no backend for it on this machine"
    raise ModelError(Diagnostic("E461", message, help=f"{_first(error)}\n{_DENSE}", where=where)) from error


def _first(error: Exception) -> str:
    lines = [each.strip() for each in str(error).splitlines() if each.strip()]
    return lines[0] if lines else type(error).__name__


def structure(kind: Any, path: Path, where: str, trust_remote_code: bool) -> Any:
    """The model without its weights. Raises ModelError."""
    remote = {} if hasattr(kind, "_from_config") else {"trust_remote_code": trust_remote_code}
    try:
        config = read_config(kind, path, trust_remote_code)
        with torch.device("meta"):
            return (getattr(kind, "_from_config", None) or kind.from_config)(config, **remote)
    except Exception as error:  # a config's own checks, and whatever its model meets
        message = f"no {kind.__name__} can be made of this config: {_first(error)}"
        raise ModelError(Diagnostic("E453", message, where=where)) from error


def read_config(kind: Any, path: Path, trust_remote_code: bool, changes: Mapping[str, Any] | None = None) -> Any:
    """The config in a directory, or the part of it that a class is for, with changes."""
    part = getattr(kind, "config_class", None)
    whole = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, **(changes or {}))
    if part is None or isinstance(whole, part):
        return whole
    return part.from_pretrained(str(path), **(changes or {}))
