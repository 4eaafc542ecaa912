"""What a user of PEFT runs, with one import changed: `python script.py peft|peftc.peft KIND DIRECTORY`.

The lines between the two markers are the user's. Everything that comes out is saved, to be compared.
"""

import importlib
import sys
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file

PACKAGE, KIND, DIRECTORY = sys.argv[1:4]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[1, 5, 9, 17, 23], [2, 3, 4, 40, 41]])


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2))


def t5():
    config = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config)


def vit():
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))


IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
KINDS = {
    "causal": (
        llama,
        {"input_ids": IDS, "labels": IDS},
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]},
    ),
    "classifier": (
        bert,
        {"input_ids": IDS, "labels": torch.tensor([0, 2])},
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    ),
    "seq2seq": (t5, {"input_ids": IDS, "labels": IDS}, {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]}),
    "images": (
        vit,
        {"pixel_values": IMAGES, "labels": torch.tensor([0, 2])},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    ),
}


def fresh():
    torch.manual_seed(0)
    return KINDS[KIND][0]().eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits.clone()


BATCH, FIELDS = KINDS[KIND][1:]
ours = importlib.import_module(PACKAGE)
LoraConfig, PeftModel, get_peft_model = ours.LoraConfig, ours.PeftModel, ours.get_peft_model
found = {"start": logits(fresh())}

# --- the user's lines ---
model = get_peft_model(fresh(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **FIELDS))
model.print_trainable_parameters()
torch.manual_seed(1)
with torch.no_grad():  # the same start whoever draws it
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.shape[-1] != parameter.shape[0]:
            parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).reshape(parameter.shape))
optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
for _ in range(3):
    loss = model.train()(**BATCH).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
found["trained"] = logits(model)
model.save_pretrained(f"{DIRECTORY}/saved")
loaded = PeftModel.from_pretrained(fresh(), f"{DIRECTORY}/saved")
found["loaded"] = logits(loaded)
found["merged"] = logits(loaded.merge_and_unload())
model.push_to_hub(f"me/{KIND}-{PACKAGE.replace('.', '-')}")
found["downloaded"] = logits(PeftModel.from_pretrained(fresh(), f"me/{KIND}-{PACKAGE.replace('.', '-')}"))
with model.disable_adapter():
    found["disabled"] = logits(model)
# --- the end of them ---

save_file({name: value.contiguous() for name, value in found.items()}, Path(DIRECTORY) / "found.safetensors")
