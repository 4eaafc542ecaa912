"""Models of diffusers and timm: no config says of what size they can be, so these are said here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.sweep.inputs import Batch, Shape

Make = Callable[[Shape], Batch]


@dataclass(frozen=True)
class Other:
    """A class of a library, the fields of a tiny one, and a batch."""

    kind: str
    fields: Mapping[str, Any]
    batch: Make


def noise(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes)


def steps(shape: Shape) -> torch.Tensor:
    return torch.arange(1, shape.rows + 1) * 100


def flux(shape: Shape) -> Batch:
    return {
        "hidden_states": noise(shape.rows, 16, 16),
        "encoder_hidden_states": noise(shape.rows, shape.length, 32),
        "pooled_projections": noise(shape.rows, 32),
        "timestep": steps(shape) / 1000,
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(shape.length, 3),
    }


def text(shape: Shape, *sizes: int, width: int = 32) -> Batch:
    return {
        "hidden_states": noise(shape.rows, *sizes),
        "encoder_hidden_states": noise(shape.rows, shape.length, width),
        "timestep": steps(shape),
    }


BLOCKS = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16)
DIFFUSERS: Mapping[str, Other] = {
    "unet": Other(
        "UNet2DConditionModel",
        dict(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        lambda shape: {
            "sample": noise(shape.rows, 4, 16, 16 * shape.larger),
            "timestep": steps(shape),
            "encoder_hidden_states": noise(shape.rows, shape.length, 32),
        },
    ),
    "flux": Other(
        "FluxTransformer2DModel",
        dict(
            **BLOCKS,
            num_single_layers=2,
            in_channels=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        flux,
    ),
    "sd3": Other(
        "SD3Transformer2DModel",
        dict(
            **BLOCKS,
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=32,
        ),
        lambda shape: {**text(shape, 4, 16, 16), "pooled_projections": noise(shape.rows, 32)},
    ),
    "pixart": Other(
        "PixArtTransformer2DModel",
        dict(
            **BLOCKS,
            sample_size=16,
            cross_attention_dim=32,
            caption_channels=32,
            in_channels=4,
            out_channels=8,
            norm_num_groups=8,
        ),
        lambda shape: text(shape, 4, 16, 16) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "sana": Other(
        "SanaTransformer2DModel",
        dict(
            **BLOCKS,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        lambda shape: text(shape, 4, 16, 16),
    ),
    "qwen-image": Other(
        "QwenImageTransformer2DModel",
        dict(**BLOCKS, in_channels=16, out_channels=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)),
        lambda shape: (
            text(shape, 16, 16)
            | {
                "encoder_hidden_states_mask": torch.ones(shape.rows, shape.length, dtype=torch.long),
                "img_shapes": [[(1, 4, 4)]] * shape.rows,
                "timestep": steps(shape) / 1000,
            }
        ),
    ),
    "wan": Other(
        "WanTransformer3DModel",
        dict(**BLOCKS, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64, rope_max_seq_len=64),
        lambda shape: text(shape, 4, 1, 8, 8 * shape.larger),
    ),
    "vae": Other(
        "AutoencoderKL",
        dict(
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
        ),
        lambda shape: {"sample": noise(shape.rows, 3, 16, 16 * shape.larger)},
    ),
}
TIMM = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "convnext_atto",
    "resnet18",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "mixer_s32_224",
    "coat_lite_tiny",
    "levit_128s",
    "xcit_nano_12_p16_224",
    "mobilevit_xxs",
)


def made_by_diffusers(name: str) -> tuple[nn.Module, Make]:
    """A tiny model of diffusers, and its batch."""
    import diffusers

    torch.manual_seed(0)
    each = DIFFUSERS[name]
    return getattr(diffusers, each.kind)(**each.fields), each.batch


def made_by_timm(name: str) -> tuple[nn.Module, Make]:
    """A model of timm, without its dropping, and its batch."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=8)
    channels, height, width = model.default_cfg["input_size"]
    return model, lambda shape: {"x": noise(shape.rows, channels, height, width)}
