"""Tiny adapted models, the calls that their programs are tried with, and what the models themselves say to them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from peftc.compiler.api import adapt
from tests import zoo

LARGE = dict(initializer_range=0.3)  # so that tokens differ
ENDLESS = dict(eos_token_id=None)

FIELDS: dict[str, dict[str, Any]] = {
    "llama": dict(**ENDLESS, **LARGE),
    "gpt2": dict(**ENDLESS, **LARGE),
    "bert": dict(**LARGE),
    # Tied, it would say the same token over and over.
    "t5": dict(**ENDLESS, initializer_factor=1.0, tie_word_embeddings=False),
    "vit": dict(**LARGE),
}
MODELS: dict[str, Callable[[], nn.Module]] = {name: partial(zoo.make, name, **FIELDS[name]) for name in FIELDS}
SPEAKERS = ("llama", "gpt2", "t5")
GENERATE = ("LlamaConfig", "GPT2Config", "T5Config")

TOKENS = list(range(3, 40))  # more than half, so that every text has some
SPECS = {
    "lora": "lora(rank = 4) { on all linear }",
    "dora": "dora(rank = 4) { on all linear }",
    "ia3": "ia3 { on all linear }",
    "oft": "oft(block = 8) { on all linear }",
    "prefix": "prefix(length = 3)",
    "prompt": "prompt(length = 3)",
    "tokens": f"lora(rank = 2) {{ on all linear  tokens {TOKENS} }}",
}


@dataclass(frozen=True)
class Called:
    """A call: an entry of an artifact and what is given to it; `after` is the place of the call that it continues."""

    entry: str
    inputs: Mapping[str, torch.Tensor]
    after: int | None = None


def model(name: str) -> nn.Module:
    """One of the models; what starts at constants, which would hide mistakes, is moved."""
    torch.manual_seed(len(name))
    made = MODELS[name]().eval()
    with torch.no_grad():
        for each in made.parameters():
            if each.dim() == 1:
                each.add_(torch.randn_like(each) * 0.1)
    return made


@functools.cache
def host(name: str) -> Any:
    """An adapted model without adapters, the same object each time: it keeps its traces. See `hosted`."""
    return adapt(model(name)).eval()


@contextmanager
def hosted(adapted: Any, specs: Sequence[str], names: Sequence[str] = "ab", std: float = 0.2) -> Iterator[Any]:
    """Adapters away from where they start, the first one active; they are gone afterwards."""
    try:
        for seed, (name, spec) in enumerate(zip(names, specs, strict=True)):
            adapted.add_adapter(f"adapter {name} = {spec}")
            move(adapted, name, seed, std)
        adapted.set_adapter(names[0])
        yield adapted.eval()
    finally:
        adapted.delete_adapter(adapted._adapter_state.names())


@torch.no_grad()
def move(adapted: Any, name: str, seed: int, std: float = 0.2) -> None:
    """Move an adapter's values."""
    generator = torch.Generator().manual_seed(seed)
    for each in adapted._adapter_state.adapter(name).parameters():
        each.add_((torch.randn(each.shape, generator=generator) * std).to(each.dtype))


def text(rows: int, length: int, padded: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask; all rows but the last begin with padding if asked for."""
    generator = torch.Generator().manual_seed(100 * rows + length + seed)
    ids = torch.randint(3, zoo.VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows - 1 if padded else 0):
        mask[row, : 1 + row % 2] = 0
    return ids.where(mask.bool(), torch.zeros_like(ids)), mask


def calls(name: str, entry: str) -> list[Called]:
    """Four calls of a model's programs: one row and more, one token and more, a past and none, padding and none."""
    if name == "vit":
        sizes = ((1, 0), (2, 0), (3, 0), (5, 0))
        return [Called("forward", {"pixel_values": torch.randn(rows, 3, 16, 16)}) for rows, _ in sizes]
    if entry == "forward":
        return [_forward(name, *each) for each in ((1, 1, False), (3, 6, True), (2, 1, False), (4, 9, True))]
    found = []
    for rows, first, then, padded in ((1, 4, 1, False), (3, 6, 2, True)):
        ids, mask = text(rows, first, padded)
        more, marks = text(rows, then, seed=7)
        whole = torch.cat([mask, marks], 1)
        positions = (whole.cumsum(-1) - 1).clamp(min=0)
        if name == "t5":
            own = {"input_ids": ids, "attention_mask": mask}
            begin, _ = text(rows, then + 1, seed=9)
            found.append(Called("prefill", {**own, "decoder_input_ids": begin}))
            found.append(Called("decode", {**own, "decoder_input_ids": more}, len(found) - 1))
            continue
        places = positions[:, :first]
        found.append(Called("prefill", {"input_ids": ids, "attention_mask": mask, "position_ids": places}))
        places = positions[:, first:]
        inputs = {"input_ids": more, "attention_mask": whole, "position_ids": places}
        found.append(Called("decode", inputs, len(found) - 1))
    return found


def _forward(name: str, rows: int, length: int, padded: bool) -> Called:
    ids, mask = text(rows, length, padded)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = text(rows, length + 2, seed=5)[0]
    if name == "bert":
        inputs["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(rows, -1).contiguous()
    return Called("forward", inputs)


@torch.no_grad()
def said(adapted: Any, made: Sequence[Called]) -> list[dict[str, torch.Tensor]]:
    """What an adapted model says to these calls when `generate` calls it, or its user.

    The logits of a text's last token, and the cache; or what a forward gives.
    """
    found: list[dict[str, torch.Tensor]] = []
    outputs: list[Any] = []
    for each in made:
        speaks, double = each.entry != "forward", "decoder_input_ids" in each.inputs
        given: dict[str, Any] = dict(each.inputs)
        if speaks and not double:
            cache = DynamicCache() if each.after is None else outputs[each.after].past_key_values
            given |= {"past_key_values": cache, "logits_to_keep": 1}
        if speaks and double and each.after is not None:
            before = outputs[each.after]
            given["past_key_values"] = before.past_key_values
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=before.encoder_last_hidden_state)
            del given["input_ids"]
        if type(adapted.config).__name__ in GENERATE:
            given["use_cache"] = speaks
        outputs.append(adapted(**given))
        found.append({"logits": outputs[-1].logits})
        if speaks:
            found[-1] = {"logits": outputs[-1].logits[:, -1:], **_read(outputs[-1].past_key_values)}
    return found


def _read(cache: Any) -> dict[str, torch.Tensor]:
    own = getattr(cache, "self_attention_cache", cache)
    found = {}
    for index, layer in enumerate(own.layers):
        found |= {f"present_{index}_key": layer.keys, f"present_{index}_value": layer.values}
    return {name: value.clone() for name, value in found.items()}


def rows_of(results: Mapping[str, Sequence[dict[str, torch.Tensor]]], chosen: Sequence[torch.Tensor]) -> list[Any]:
    """Of what each adapter gives, the rows that chose it."""
    names = list(results)
    return [
        {
            key: torch.stack([results[names[which]][index][key][row] for row, which in enumerate(ids.tolist())])
            for key in next(iter(results.values()))[index]
        }
        for index, ids in enumerate(chosen)
    ]


def visible(call: Called, name: str, value: torch.Tensor) -> torch.Tensor:
    """The part of an output that padding does not hide."""
    mask = call.inputs.get("attention_mask")
    if call.entry == "forward" and value.dim() == 3 and mask is not None and "decoder_input_ids" not in call.inputs:
        return value[mask.bool()]
    if call.entry != "forward" and name == "logits":
        return value[:, -1:]
    if name.startswith("present_") and mask is not None and "decoder_input_ids" not in call.inputs:
        return value.transpose(1, 2)[mask.bool()]
    return value
