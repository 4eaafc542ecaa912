"""What diffusers calls things in a file of LoRA weights. Known to hold for 0.42; older spellings are among the ends."""

from peftc.passes.foreign.key_table import ALPHA, BIAS, MAGNITUDE, A, B, KeyTable

WEIGHTS = "pytorch_lora_weights.safetensors"

KEYS = KeyTable(
    library="diffusers",
    parts=(
        *("unet.", "transformer.", "transformer_2.", "prior.", "decoder.", "controlnet."),
        *("text_encoder.", "text_encoder_2.", "text_encoder_3."),
    ),
    ends={
        ".lora_A.weight": A,
        ".lora_B.weight": B,
        ".lora_B.bias": BIAS,
        ".lora.down.weight": A,
        ".lora.up.weight": B,
        ".lora_linear_layer.down.weight": A,
        ".lora_linear_layer.up.weight": B,
        "_lora.down.weight": A,
        "_lora.up.weight": B,
        ".lora_magnitude_vector.weight": MAGNITUDE,
        ".lora_magnitude_vector": MAGNITUDE,
        ".alpha": ALPHA,
    },
    refused={".norm_q.weight": "norms of Flux control", ".norm_k.weight": "norms of Flux control"},
    renamed={r"\.processor\.to_out$": ".to_out.0", r"\.processor\.(to_[qkv])$": r".\1"},
    settings="lora_adapter_metadata",
)
