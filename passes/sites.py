"""Finds the sites of a model: by module, before any graph exists."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftc.grammar.select import Candidate, Universe
from peftc.passes.site import Site

HEADS = ("score", "classifier")

QUANTIZED = ("bitsandbytes", "gptqmodel", "awq", "hqq", "torchao")


def collect(model: nn.Module) -> tuple[Site, ...]:
    """Every weight an adapter can reach, in the model's own order.

    Linear, Conv1D and Embedding modules give one site each, under the module's name; every 2-D or 3-D parameter held
    directly by another kind of module gives a `parameter` site under its own name.
    """
    aliases = tied_names(model)
    return tuple(_sites(model, aliases, _output_layers(model)))


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every parameter and buffer name, all names of the same tensor, in the model's order."""
    groups: dict[int, list[str]] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(groups[id(tensor)]) for name, tensor in every}


def universe(model: nn.Module, sites: tuple[Site, ...]) -> Universe:
    """What selectors choose from."""
    candidates = tuple(
        Candidate(
            name=site.name,
            kind=site.kind,
            in_features=site.in_features,
            out_features=site.out_features,
            output=site.output,
        )
        for site in sites
    )
    modules = tuple(name for name, _ in model.named_modules(remove_duplicate=False) if name)
    return Universe(candidates=candidates, modules=modules)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module stores its weight packed by a quantization library."""
    return type(module).__module__.partition(".")[0] in QUANTIZED


def _sites(model: nn.Module, aliases: dict[str, tuple[str, ...]], output: frozenset[int]) -> Iterator[Site]:
    for path, module in model.named_modules(remove_duplicate=False):
        # A model that is a linear itself has no name to be called by, only its weight has.
        if path and isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            yield _module_site(path, module, aliases, id(module) in output)
            continue
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim in (2, 3) and parameter.is_floating_point():
                yield _parameter_site(path, leaf, module, parameter, aliases)


def _module_site(path: str, module: nn.Module, aliases: dict[str, tuple[str, ...]], is_output: bool) -> Site:
    weight = module.get_parameter("weight")
    match module:
        case nn.Linear():
            kind, out_features, in_features = "linear", module.out_features, module.in_features
        case nn.Embedding():
            kind, out_features, in_features = "embedding", module.embedding_dim, module.num_embeddings
        case _:
            kind, (in_features, out_features) = "conv1d", tuple(weight.shape)
    name = f"{path}.weight".lstrip(".")
    return Site(
        module=path,
        leaf="weight",
        kind=kind,
        out_features=out_features,
        in_features=in_features,
        transposed=kind != "linear",
        dtype=weight.dtype,
        device=weight.device,
        tied=tuple(each for each in aliases[name] if each != name),
        output=is_output,
    )


def _parameter_site(
    path: str, leaf: str, module: nn.Module, parameter: torch.Tensor, aliases: dict[str, tuple[str, ...]]
) -> Site:
    # PEFT reads a stack of experts as [count, in, out] and swaps the two unless the module says `is_transposed`.
    if parameter.ndim == 3:
        transposed = bool(getattr(module, "is_transposed", False))
        count, first, second = parameter.shape
    else:
        transposed, count = False, 1
        first, second = parameter.shape
    name = f"{path}.{leaf}".lstrip(".")
    return Site(
        module=path,
        leaf=leaf,
        kind="parameter",
        out_features=second if transposed else first,
        in_features=first if transposed else second,
        count=count,
        transposed=transposed,
        dtype=parameter.dtype,
        device=parameter.device,
        tied=tuple(each for each in aliases[name] if each != name),
    )


def _output_layers(model: nn.Module) -> frozenset[int]:
    """The modules that turn hidden states into the model's answer: a language-model head, a classifier.

    PEFT's "all-linear" leaves them out too, for classifiers of whole sequences; here any classifier counts.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None and type(model).__name__.endswith("Classification"):
        head = next((each for name in HEADS if (each := getattr(model, name, None)) is not None), None)
    return frozenset(id(each) for each in head.modules()) if isinstance(head, nn.Module) else frozenset()
