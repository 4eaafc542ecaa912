"""The places of a model that are no weight: its embedded tokens, its cache, its attention modules."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.site import Site
from peftc.passes.plan.sites import input_embedding, tied_names
from peftc.passes.quantized.schemes.known import packed


@dataclass(frozen=True)
class Heads:
    """What one layer's keys (and values) of a token are: `heads` of `size` numbers."""

    layers: int
    heads: int
    size: int

    @property
    def width(self) -> int:
        """How many numbers one layer's keys of a token are."""
        return self.heads * self.size


def fronts(model: nn.Module) -> tuple[Site, ...]:
    """Every place of the model where something can be put in front."""
    embedding, heads = _embedding(model), heads_of(getattr(model, "config", None))
    found: list[Site] = []
    first = next(model.parameters(), torch.empty(0))
    stacks = 2 if contract.is_encoder_decoder(getattr(model, "config", None)) else 1
    if embedding is not None:
        path, module = embedding
        weight, layers = module.weight, heads.layers if heads else 0
        found.append(
            Site(
                module=path,
                leaf="weight",
                kind="prompt",
                out_features=module.embedding_dim,
                in_features=module.num_embeddings,
                transposed=True,
                dtype=weight.dtype,
                device=weight.device,
                layers=layers,
                heads=heads.heads if heads else 0,
                stacks=stacks,
                scale=_scale(module),
                tied=tuple(each for each in tied_names(model)[f"{path}.weight"] if each != f"{path}.weight"),
            )
        )
        first = weight
    if heads is not None:
        found.append(
            Site(
                module="",
                leaf="",
                kind="cache",
                out_features=2 * heads.layers * heads.width,
                in_features=heads.width,
                dtype=first.dtype,
                device=first.device,
                layers=heads.layers,
                heads=heads.heads,
                stacks=stacks,
            )
        )
    return (*found, *_attention(model, heads))


def heads_of(config: Any) -> Heads | None:
    """The keys and values of a model's layers, of its decoder if it has one, as its config has them.

    None where it does not say, or layers differ in them.
    """
    if config is None:
        return None
    layers = queries = None
    if contract.is_encoder_decoder(config):  # a config's view of its text alone may say others
        layers, queries = contract.decoder_layers(config), contract.decoder_heads(config)
    config = contract.text_config(config, decoder=True)
    if contract.heads_vary(config):
        return None
    layers = layers or contract.layers(config)
    queries = queries or contract.heads(config)
    heads = contract.key_heads(config) or queries
    size = contract.head_size(config)
    if size is None and queries:
        size = (contract.width(config) or 0) // queries
    if not (layers and heads and size):
        return None
    return Heads(layers, heads, size)


def _embedding(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    path = input_embedding(model)
    module = model.get_submodule(path)
    return (path, module) if path and isinstance(module, nn.Embedding) else None


def _scale(module: nn.Embedding) -> float:
    """What the module multiplies its rows by, as its weight's type holds it."""
    scale, as_number = contract.embedding_scale(module)
    if isinstance(scale, torch.Tensor) and not scale.is_meta:
        return float(scale.to(module.weight.dtype))
    return float(as_number if isinstance(scale, torch.Tensor) else scale)


def _attention(model: nn.Module, heads: Heads | None) -> list[Site]:
    found: list[Site] = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        fused = isinstance(children.get(contract.PACKED), Conv1D) and contract.PACKED_QUERY not in children
        if not (set(contract.SEPARATE) <= set(children) or fused):
            continue
        query = children[contract.PACKED if fused else contract.SEPARATE[0]]
        held = packed(query)
        if held is not None:
            hidden, dtype, device = held.packing.in_features, held.packing.dtype, held.parts[0].device
        else:
            weight: Any = getattr(query, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
                continue  # queries are made in another way than by a linear
            hidden, dtype, device = weight.shape[0 if fused else 1], weight.dtype, weight.device
        found.append(
            Site(
                module=path,
                leaf="",
                kind="attention",
                out_features=hidden,
                in_features=hidden,
                dtype=dtype,
                device=device,
                layers=heads.layers if heads else 0,
                heads=heads.heads if heads else 0,
            )
        )
    return found
