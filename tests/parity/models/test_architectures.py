"""Many architectures, one tiny model each: a checkpoint of peft's gives peft's outputs, tokens, gradients and merged
weights here. All of them are in docs/models.md; these forty have between them every kind of layer, cache and input.
"""

import pytest

from tests.matrix import wide
from tests.sweep.compare import Row, compared
from tests.sweep.families import made

CHOSEN = {
    "causal": (
        *("mistral", "qwen3", "gemma2", "phi3", "mixtral", "gpt_oss", "gpt_neox", "opt", "bloom", "falcon", "granite"),
        *("gpt2", "mamba", "jamba", "bamba", "lfm2", "falcon_h1", "qwen3_next", "minimax", "rwkv", "deepseek_v3"),
        "afmoe",
    ),
    "vision-language": ("llava", "llava_next", "qwen3_vl", "idefics3", "gemma3", "mistral3", "blip-2"),
    "masked": ("big_bird", "deberta-v2", "modernbert", "longformer"),
    "seq2seq": ("bart", "led", "switch_transformers"),
    "vision": ("vit", "convnext"),
    "speech": ("wav2vec2", "whisper"),
}
ALWAYS = ("opt", "falcon")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "family"), wide([(name, family) for family, all in CHOSEN.items() for name in all], ALWAYS)
)
def test_architecture(name: str, family: str) -> None:
    row = compared(Row(family, name), *made(family, name), training=True)
    assert not row.plain, row.plain
    assert not row.peft, row.peft
    assert row.ours == {}
