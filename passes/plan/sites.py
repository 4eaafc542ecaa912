"""Finds the sites of a model: by module, before any graph exists."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftc.grammar.spec.select import Candidate, Universe
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.site import Site
from peftc.passes.quantized.schemes.known import Packed, packed

HEADS = ("score", "classifier")

CONVOLUTIONS = {nn.Conv1d: "convolution1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
SINGLE = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)  # one weight each
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of a MultiheadAttention


def collect(model: nn.Module) -> tuple[Site, ...]:
    """Every weight an adapter can reach, in the model's own order.

    Linear, Conv1D, Embedding and convolution modules give one site each, under the module's name. The projections of a
    MultiheadAttention are `multihead_attention` sites under their own names, its output projection a linear. Every 2-D
    or 3-D parameter held directly by another kind of module gives a `parameter` site under its own name.
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
    modules = tuple(name for name, _ in model.named_modules(remove_duplicate=False) if name)
    return Universe(candidates=candidates(sites), modules=modules)


def candidates(sites: Iterable[Site]) -> tuple[Candidate, ...]:
    """Sites as selectors see them."""
    return tuple(
        Candidate(
            name=site.name,
            kind=site.kind,
            in_features=site.in_features,
            out_features=site.out_features,
            output=site.output,
            attention=site.attention,
        )
        for site in sites
    )


def input_embedding(model: nn.Module) -> str:
    """The name of the module that embeds tokens; empty where the model does not say."""
    return _told(model, contract.EMBEDDINGS_IN)


def output_head(model: nn.Module) -> str:
    """The name of the module that gives logits; empty where the model does not say."""
    return _told(model, contract.EMBEDDINGS_OUT)


def _told(model: nn.Module, method: str) -> str:
    get = getattr(model, method, None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # a model of pictures
        return ""
    return next((name for name, each in model.named_modules() if name and each is found), "")


def _sites(model: nn.Module, aliases: dict[str, tuple[str, ...]], output: frozenset[int]) -> Iterator[Site]:
    attention: str | None = None
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            attention = path
        held = packed(module) if path else None
        if held is not None:
            yield _packed_site(path, held, id(module) in output)
            continue
        # A model that is a linear itself has no name to be called by, only its weight has. One that computes its weight
        # (weight_norm) has parameters of other names.
        if path and isinstance(module, SINGLE) and module._parameters.get("weight") is not None:
            site = _module_site(path, module, aliases, id(module) in output)
            projects = attention is not None and path == f"{attention}.out_proj".lstrip(".")
            yield replace(site, attention=attention) if projects else site
            continue
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim in (2, 3) and parameter.is_floating_point():
                site = _parameter_site(path, leaf, module, parameter, aliases)
                if isinstance(module, nn.MultiheadAttention) and leaf in PROJECTIONS:
                    has_bias = leaf == "in_proj_weight" and module.in_proj_bias is not None
                    site = replace(site, kind="multihead_attention", attention=path, has_bias=has_bias)
                yield site


def _packed_site(path: str, held: Packed, is_output: bool) -> Site:
    packing = held.packing
    return Site(
        module=path,
        leaf="weight",
        kind="linear",
        out_features=packing.out_features,
        in_features=packing.in_features,
        dtype=packing.dtype,
        device=held.parts[0].device,
        has_bias=getattr(held.module, "bias", None) is not None,
        output=is_output,
        packing=packing,
    )


def _module_site(path: str, module: nn.Module, aliases: dict[str, tuple[str, ...]], is_output: bool) -> Site:
    weight = module.get_parameter("weight")
    kernel: tuple[int, ...] = ()
    groups = 1
    match module:
        case nn.Linear():
            kind, out_features, in_features = "linear", module.out_features, module.in_features
        case nn.Embedding():
            kind, out_features, in_features = "embedding", module.embedding_dim, module.num_embeddings
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            kind = next(kind for type, kind in CONVOLUTIONS.items() if isinstance(module, type))
            out_features, in_features = weight.shape[0], weight[0].numel()
            kernel, groups = tuple(weight.shape[2:]), module.groups
        case _:
            kind, (in_features, out_features) = "conv1d", tuple(weight.shape)
    name = f"{path}.weight".lstrip(".")
    return Site(
        module=path,
        leaf="weight",
        kind=kind,
        out_features=out_features,
        in_features=in_features,
        transposed=kind in ("conv1d", "embedding"),
        kernel=kernel,
        groups=groups,
        dtype=weight.dtype,
        device=weight.device,
        tied=tuple(each for each in aliases[name] if each != name),
        has_bias=getattr(module, "bias", None) is not None,
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
    get = getattr(model, contract.EMBEDDINGS_OUT, None)
    head = get() if callable(get) else None
    if head is None and type(model).__name__.endswith("Classification"):
        head = next((each for name in HEADS if (each := getattr(model, name, None)) is not None), None)
    return frozenset(id(each) for each in head.modules()) if isinstance(head, nn.Module) else frozenset()
