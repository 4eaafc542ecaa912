"""Where PEFT is not installed: configurations, models, files, and a Trainer that resumes."""

import os
import subprocess
import sys
import textwrap

HIDDEN = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import importlib.util
assert importlib.util.find_spec("peft") is None
"""


def run(code, directory):
    script = HIDDEN + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=directory, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]


def test_configurations_and_files(tmp_path):
    run(
        """
        import torch
        from torch import nn
        from peftc.grammar.diagnostics import ArgumentTypeError
        from peftc.peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model

        torch.manual_seed(0)
        base, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.ones(1, 4)
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
        assert isinstance(config, PeftConfig) and config.peft_type == PeftType.LORA == "LORA"
        model = get_peft_model(base, config).eval()
        assert isinstance(model, PeftModel) and not torch.equal(model(x), base(x))
        assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (2, 6)
        model.save_pretrained("saved")
        torch.testing.assert_close(PeftModel.from_pretrained(base, "saved").eval()(x), model(x))
        assert model.get_model_status().peft_types == {"default": "LORA"}
        get_peft_model(base, IA3Config(target_modules=["0"], feedforward_modules=["0"]))
        try:
            LoraConfig(rank=2)
        except ArgumentTypeError as error:
            assert "LoraConfig has no field 'rank'" in str(error)
        else:
            raise AssertionError("a field that is none was taken")
        """,
        tmp_path,
    )


def test_a_trainer_resumes(tmp_path):
    run(
        """
        import torch
        import transformers as hf
        from peftc import compiler

        sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        torch.manual_seed(0)
        base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
        rows = [{"input_ids": torch.arange(1, 6) + i, "labels": torch.arange(1, 6) + i} for i in range(8)]

        def trained(**options):
            torch.manual_seed(1)
            model = compiler.apply(base, "adapter default = lora(rank = 2) { on q_proj }", progress=False)
            arguments = hf.TrainingArguments(
                "out", max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[],
                use_cpu=True, disable_tqdm=True, seed=0,
            )
            hf.Trainer(model, arguments, train_dataset=rows).train(**options)
            return model.adapter_state_dict("default")

        whole = {name: value.clone() for name, value in trained().items()}
        resumed = trained(resume_from_checkpoint="out/checkpoint-2")
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
        """,
        tmp_path,
    )
