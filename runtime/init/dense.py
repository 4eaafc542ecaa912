"""The weights that a quantized base was made from, for methods that start from what quantization rounded away."""

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.plan.site import Site

Source = nn.Module | str | PathLike[str]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HELP = "pass dense=: the model, or its directory of safetensors, that this one was quantized from"
_ALIKE = 0.5  # as far as a weight may be from what is stored of it, in units of itself; of 2 bits it is some 0.4


class Dense:
    """Looks up weights by the names that a quantized model has for them."""

    def __init__(self, source: Source):
        """Raises UsageError unless `source` is a model, or a directory with a model's safetensors."""
        self._find = _of_model(source) if isinstance(source, nn.Module) else _of_directory(Path(source))

    def weight(self, site: Site, stored: torch.Tensor) -> torch.Tensor:
        """The weight of a site, `[out, in]`, in float32 on the device of `stored`, which is what is stored of it.

        A weight that is kept the other way round (transformers' Conv1D) is turned. Raises UsageError if it is not
        there, is of another size, or is not what was quantized.
        """
        found = self._find(site.weight)
        wanted = tuple(stored.shape)
        if found is None or tuple(found.shape) not in (wanted, wanted[::-1]):
            what = "is not in the dense model" if found is None else f"is {_sizes(found.shape)} there"
            message = f"the weight of {site.name}, {_sizes(wanted)}, {what}"
            fail(UsageError, "E578", message, help="give the model that this one was quantized from")
        wide, near = found.detach().to(stored.device, torch.float32), stored.float()
        turns = [each for each in (wide, wide.T) if tuple(each.shape) == wanted]
        best = min(turns, key=lambda each: float((each - near).norm()))
        if float((best - near).norm()) > _ALIKE * float(best.norm()):
            message = f"the weight of {site.name} in the dense model is not what was quantized here"
            fail(UsageError, "E578", message, help="give the model that this one was quantized from")
        return best


class ImaginedDense(Dense):
    """Weights of nothing, where only the sizes matter."""

    def __init__(self) -> None:
        super().__init__(nn.Module())

    def weight(self, site: Site, stored: torch.Tensor) -> torch.Tensor:
        """What is stored."""
        return stored.float()


def quantization_error(dense: Dense | None, site: Site, stored: torch.Tensor, method: str) -> torch.Tensor:
    """What quantization rounded away of a site's weight, `[out, in]`: the dense one less what is stored of it.

    Raises UsageError where the site is not quantized, or there is no dense model.
    """
    if site.packing is None:
        message = f"'{method}' starts from what quantization rounds away, and {site.name} is not quantized"
        help = "quantize the base: base { quantize = nf4() }, or load it quantized; or choose other modules"
        fail(UsageError, "E576", message, help=help)
    if dense is None:
        message = f"'{method}' starts from what quantization rounds away, and there is nothing to compare with"
        fail(UsageError, "E577", message, help=_HELP)
    return dense.weight(site, stored) - stored.float()


Find = Callable[[str], torch.Tensor | None]


def _of_model(model: nn.Module) -> Find:
    return dict(model.named_parameters(remove_duplicate=False)).get


def _of_directory(directory: Path) -> Find:
    """Tensors read from the files one at a time, under their names with or without the base model's prefix."""
    files = _files(directory)

    def find(name: str) -> torch.Tensor | None:
        held = next((each for each in (name, name.partition(".")[2]) if each in files), None)
        held = held or next((each for each in files if each.endswith(f".{name}")), None)
        if held is None:
            return None
        with safe_open(files[held], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(held)
            return tensor

    return find


def _files(directory: Path) -> Mapping[str, Path]:
    """The file that holds each tensor."""
    where = str(directory)
    try:
        if (directory / INDEX).is_file():
            index = json.loads((directory / INDEX).read_bytes())
            names: dict[str, str] = index["weight_map"]
            if any(Path(each).name != each for each in names.values()):
                fail(UsageError, "E577", f"'{INDEX}' names files outside of its directory", help=_HELP, where=where)
            return {name: directory / file for name, file in names.items()}
        if (directory / WEIGHTS).is_file():
            with safe_open(directory / WEIGHTS, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), directory / WEIGHTS)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        fail(UsageError, "E577", f"the dense model cannot be read: {error}", help=_HELP, where=where)
    fail(UsageError, "E577", f"no file '{WEIGHTS}' here", help=_HELP, where=where)


def _sizes(shape: tuple[int, ...] | torch.Size) -> str:
    return " x ".join(map(str, shape))
