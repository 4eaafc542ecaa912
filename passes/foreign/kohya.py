"""What kohya's sd-scripts, and who writes files as they do, call things in a file of LoRA weights."""

from peftc.passes.foreign.key_table import ALPHA, A, B, KeyTable

KEYS = KeyTable(
    library="kohya",
    parts=("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"),
    ends={".lora_down.weight": A, ".lora_up.weight": B, ".alpha": ALPHA},
    refused={
        ".lora_mid.weight": "LoCon in Tucker's form",
        ".dora_scale": "DoRA",
        **dict.fromkeys((".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"), "LoHa"),
        **dict.fromkeys(
            (".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"), "LoKr"
        ),
        **dict.fromkeys((".oft_blocks", ".oft_diag"), "OFT"),
        **dict.fromkeys((".diff", ".diff_b", ".w_norm", ".b_norm"), "whole differences of weights"),
        **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "GLoRA"),
    },
    flat=True,
)
