"""One case: adapters of a small UNet or text encoder, written by diffusers, give its outputs here."""

import sys
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from peftc import compiler

SIZES = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=4,
)
CALL = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8))
WEIGHTS = "pytorch_lora_weights.safetensors"


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**SIZES).eval()


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    return CLIPTextModel(CLIPTextConfig(**sizes)).eval()


def adapted(model, config: LoraConfig):
    model.add_adapter(config)
    stir(model)
    return model


def stir(model) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_" in name:
                each.copy_(torch.randn_like(each) * 0.3)


def main(case: str, where: Path) -> None:
    alpha = 2 if case in ("peft_keys", "old_keys") else 6
    targets = ["to_q", "to_v", "to_out.0", "proj_in", "conv1"]
    theirs = adapted(unet(), LoraConfig(r=2, lora_alpha=alpha, target_modules=targets))
    state = get_peft_model_state_dict(theirs)
    config = theirs.peft_config["default"].to_dict()
    if case == "text_encoder":
        text = get_peft_model(text_encoder(), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"])).eval()
        stir(text)
        held = {key.removeprefix("base_model.model."): each for key, each in get_peft_model_state_dict(text).items()}
        StableDiffusionPipeline.save_lora_weights(
            where,
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            text_encoder_lora_layers=convert_state_dict_to_diffusers(held),
        )
        ids = torch.tensor([[3, 9, 4]])
        with torch.no_grad():
            ours = compiler.load(text_encoder(), where)(ids).last_hidden_state
            torch.testing.assert_close(ours, text(ids).last_hidden_state)
            assert (ours - text_encoder()(ids).last_hidden_state).abs().max() > 1e-3
        return
    if case == "kohya":
        save_file(convert_state_dict_to_kohya({f"unet.{key}": each for key, each in state.items()}), where / WEIGHTS)
        # Its converter gives every module the rank as alpha.
        for module in theirs.modules():
            if hasattr(module, "scaling"):
                module.scaling["default"] = 1.0
        (where / WEIGHTS).rename(where / "kohya.safetensors")
        assert any(key.startswith("lora_unet_") for key in load_file(where / "kohya.safetensors"))
        where = where / "kohya.safetensors"
    else:
        layers = convert_state_dict_to_diffusers(state) if case != "peft_keys" else state
        metadata = config if case == "metadata" else None
        StableDiffusionPipeline.save_lora_weights(where, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    with torch.no_grad():
        ours = compiler.load(unet(), where)(*CALL).sample
        torch.testing.assert_close(ours, theirs(*CALL).sample, rtol=1e-4, atol=1e-5)
        assert (ours - unet()(*CALL).sample).abs().max() > 1e-3


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
