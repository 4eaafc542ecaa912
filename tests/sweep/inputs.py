"""Batches that a model might take, in the order in which they are tried: it is driven by the first that it does."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = dict[str, Any]
PADDED, FIRST = 2, 5
"""How many tokens of the first row are padding; the smallest token that means nothing special."""


@dataclass(frozen=True)
class Shape:
    """How many rows a batch has, tokens of text a row, and by what the side of an image that may vary is multiplied."""

    rows: int
    length: int
    larger: int = 1


SHAPES = (Shape(2, 9), Shape(3, 14, 2))
Candidate = Callable[[Shape], Batch]


class Inputs:
    """Makes batches for one model."""

    def __init__(self, model: nn.Module, size: int):
        self.model, self.config, self.size = model, getattr(model, "config", None), size
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        self.required = {
            name
            for name, each in parameters.items()
            if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        }
        self.vocabulary = int(self.find("vocab_size") or 32)

    def find(self, *names: str) -> Any:
        """The first of these fields in the config, or in the parts of it."""
        parts = [self.config, *(getattr(self.config, f"{part}_config", None) for part in PARTS)]
        for name in names:
            for part in parts:
                found = getattr(part, name, None)
                if found is not None:
                    return found
        return None

    def candidates(self) -> Iterator[Candidate]:
        """Batches to try."""
        names = self.names
        text = "input_ids" in names
        for signal in self.signals():
            if not text or "decoder_input_ids" in names:
                yield lambda shape, signal=signal: {**signal(shape), **self.decoded(shape)}
            if text:
                for count in self.counts(signal):
                    yield lambda shape, signal=signal, count=count: self.with_text(signal(shape), shape, count(shape))
        if text:
            yield lambda shape: {**self.text(shape, padded=True), **self.decoded(shape)}
            yield lambda shape: {**self.text(shape, padded=False), **self.decoded(shape)}
            yield lambda shape: {"input_ids": self.ids(shape)}

    def ids(self, shape: Shape) -> torch.Tensor:
        """Random tokens without a special meaning."""
        top = max(FIRST + 1, min(self.vocabulary, 90))
        return torch.randint(FIRST, top, (shape.rows, shape.length))

    def text(self, shape: Shape, *, padded: bool) -> Batch:
        """Text, with padding in front of the first row."""
        ids = self.ids(shape)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :PADDED] = 0
        made = {"input_ids": ids, "attention_mask": mask} if "attention_mask" in self.names else {"input_ids": ids}
        if "bbox" in self.names:
            made["bbox"] = torch.randint(0, 20, (*ids.shape, 1)).expand(*ids.shape, 4).contiguous()
        return made

    def decoded(self, shape: Shape) -> Batch:
        """A text for a decoder beside an encoder."""
        if "decoder_input_ids" not in self.names:
            return {}
        return {"decoder_input_ids": self.ids(shape)[:, 1:]}

    def signals(self) -> Iterator[Candidate]:
        """Images, videos, spectrograms or waves."""
        names, channels = self.names, int(self.find("num_channels", "in_channels", "in_chans") or 3)
        side = self.size

        def noise(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes)

        if "image_grid_thw" in names or "grid_thw" in names:
            key = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
            patch = int(self.find("patch_size") or 8)
            for frames in (int(self.find("temporal_patch_size") or 1), 1):
                for order in ("flat", "image"):

                    def grid(shape: Shape, frames: int = frames, order: str = order) -> Batch:
                        sides = torch.tensor([[1, 4, 4 * shape.larger]] * shape.rows)
                        patches = int(sides.prod(1).sum())
                        values = noise(patches, channels * frames * patch * patch)
                        values = values if order == "flat" else noise(patches, channels, patch, patch)
                        made = {"pixel_values": values, key: sides}
                        if "image_merge_sizes" in names:
                            made["image_merge_sizes"] = torch.ones(shape.rows, dtype=torch.long)
                        return made

                    yield grid
        if "spatial_shapes" in names:
            patch = int(self.find("patch_size") or 8)

            def patches(shape: Shape) -> Batch:
                sides = torch.tensor([[4, 4]] * shape.rows)
                mask = torch.ones(shape.rows, 16, dtype=torch.long)
                values = noise(shape.rows, 16, channels * patch * patch)
                return {"pixel_values": values, "spatial_shapes": sides, "pixel_attention_mask": mask}

            yield patches
        if "flattened_patches" in names:
            patch = int(self.find("patch_size") or 8)
            yield lambda shape: {
                "flattened_patches": torch.cat(
                    [torch.ones(shape.rows, 16, 2), noise(shape.rows, 16, channels * patch * patch)], -1
                ),
                "attention_mask": torch.ones(shape.rows, 16),
            }
        if "pixel_values" in names or "pixel_values" in self.required:
            sized = "image_sizes" in names
            several = sized or "pixel_attention_mask" in names or "aspect_ratio_ids" in names
            for tiles, tells in itertools.product((2, 3, None) if several else (None,), (True, False)[not sized :]):

                def images(shape: Shape, tiles: int | None = tiles, tells: bool = tells) -> Batch:
                    own = (shape.rows,) if tiles is None else (shape.rows, tiles)
                    made: Batch = {"pixel_values": noise(*own, channels, side, side)}
                    if tells:
                        made["image_sizes"] = torch.tensor([[side, side]] * shape.rows)
                    if "high_res_pixel_values" in names:
                        made["high_res_pixel_values"] = noise(*own, channels, 2 * side, 2 * side)
                    if "pixel_attention_mask" in names:
                        made["pixel_attention_mask"] = torch.ones(*own, side, side, dtype=torch.bool)
                    return made

                yield images
            yield lambda shape: {"pixel_values": noise(shape.rows, 2, channels, side, side)}
            yield lambda shape: {"pixel_values": noise(shape.rows, 1, 2, channels, side, side)}
        for name in ("pixel_values_videos", "pixel_values_images"):
            if name in names and "pixel_values" not in names:
                yield lambda shape, name=name: {name: noise(shape.rows, 2, channels, side, side)}
        yield from self.sounds()

    def sounds(self) -> Iterator[Candidate]:
        """Spectrograms and waves."""
        bins = int(self.find(*BINS) or 16)
        frames = 2 * int(self.find("max_source_positions") or 32)
        most = int(self.find("max_length", "max_source_positions") or 64)
        for name in ("input_features", "audio_values", "input_values"):
            sizes = [(bins, frames), (frames, bins), (1, frames, bins)]
            if name == "input_values":
                sizes = [(1600,), (1, 1600), (most, bins)]
            for each in sizes if name in self.names else ():
                yield lambda shape, name=name, each=each: {name: torch.randn(shape.rows, *each)}

    def counts(self, signal: Candidate) -> Iterator[Callable[[Shape], int]]:
        """How many tokens of the text stand for an image: as many as the model makes of it, or a likely number."""

        def made(shape: Shape) -> int:
            return feature_count(self.model, signal(shape)) // shape.rows

        if self.special("image") is not None or self.special("audio") is not None:
            yield made
            yield lambda shape: self.told(signal, shape)
            for number in (16, 4, 17, 1, 8, 2, 5, 64):
                yield lambda shape, number=number: number * shape.larger
                yield lambda shape, number=number: number
        yield lambda shape: 0

    def told(self, signal: Candidate, shape: Shape) -> int:
        """As many as the model says in its refusal of one."""
        try:
            with torch.no_grad():
                self.model(**self.with_text(signal(shape), shape, 1))
        except ValueError as error:
            found = re.search(r"features:? \(?(\d+)", str(error))
            if found:
                return int(found[1]) // shape.rows
        return 1

    def special(self, what: str) -> int | None:
        """The token that stands for a place of an image, or of a sound."""
        found = self.find(
            *(f"{what}_{name}" for name in ("token_id", "token_index", "patch_id")), f"media_{what}_token_id"
        )
        if found is None and what == "image":
            found = self.find("media_placeholder_token_id", "visual_token_id", "im_patch_id")
        return found if isinstance(found, int) else None

    def with_text(self, signal: Batch, shape: Shape, count: int) -> Batch:
        """A text with the places of an image in it."""
        made = self.text(shape, padded=True)
        what = "audio" if any(name.startswith("input_") for name in signal) else "image"
        token = self.special(what)
        if count and token is not None:
            ids, mask = made["input_ids"], torch.ones(shape.rows, count, dtype=torch.long)
            places = torch.full((shape.rows, count), token)
            at = PADDED + 1
            edges = [self.find(f"{stem}_token_id") for stem in ("vision_start", "vision_end")]
            for edge, where in zip(edges, (at - 1, at), strict=True):
                if isinstance(edge, int):
                    ids[:, where] = edge
            made["input_ids"] = torch.cat([ids[:, :at], places, ids[:, at:]], dim=1)
            if "attention_mask" in made:
                old = made["attention_mask"]
                made["attention_mask"] = torch.cat([old[:, :at], mask, old[:, at:]], dim=1)
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in self.names:
                    made[name] = (made["input_ids"] == token).long()
        if "qformer_input_ids" in self.names:
            made["qformer_input_ids"] = self.ids(shape)
        if "cross_attention_mask" in self.names:
            made["cross_attention_mask"] = torch.ones(*made["input_ids"].shape, 1, 1, dtype=torch.long)
        return {**made, **signal, **self.decoded(shape)}


BINS = ("num_mel_bins", "n_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
PARTS = (
    "vision",
    "text",
    "audio",
    "encoder",
    "decoder",
    "thinker",
    "vit",
    "visual",
    "llm",
    "image",
    "backbone",
    "speech",
)


def feature_count(model: nn.Module, signal: Mapping[str, Any]) -> int:
    """How many tokens a model makes of images or sounds."""
    for name in ("get_image_features", "get_audio_features"):
        for owner in (model, getattr(model, "model", None)):
            ask = getattr(owner, name, None)
            if ask is not None and any(key.startswith("input_") for key in signal) == ("audio" in name):
                known = inspect.signature(ask).parameters
                with torch.no_grad():
                    return places(ask(**{key: each for key, each in signal.items() if key in known}))
    raise ValueError("the model does not say how many tokens an image has")


def places(value: Any) -> int:
    """How many rows of features there are."""
    if hasattr(value, "pooler_output"):
        value = value.pooler_output if value.pooler_output is not None else value[0]
    if isinstance(value, torch.Tensor):
        return value[..., 0].numel()
    return sum(map(places, value if isinstance(value, list | tuple) else [value[0]]))
