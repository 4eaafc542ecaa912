import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from peftc import compiler
from peftc.compiler.trace.example_inputs import example_inputs
from peftc.grammar.diagnostics import ModelError
from tests.compiler.commands.cli_help import write_model


def refusal(argument, **options):
    with pytest.raises(ModelError) as caught:
        compiler.find_model(argument, **options)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def saved(place, name="saved", **changes):
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**json.loads((write_model(place / "c", **changes) / "config.json").read_text()))
    )
    model.save_pretrained(place / name)
    return model


# --- what is found ---


def test_a_directory_with_weights(place):
    model = saved(place)
    found = compiler.find_model("saved")
    assert (found.origin, found.notes, found.warnings) == ("weights", (), ())
    assert type(found.model) is transformers.LlamaForCausalLM
    assert not found.model.training
    assert torch.equal(found.model.lm_head.weight, model.lm_head.weight)


def test_only_a_config_gives_random_weights_from_the_seed_and_says_so(place):
    state = torch.random.get_rng_state()
    found, again, other = (compiler.find_model("tiny", seed=seed) for seed in (0, 0, 1))
    assert found.origin == "random"
    assert "random, from seed 0" in found.notes[0]
    assert type(found.model) is transformers.LlamaForCausalLM
    assert torch.equal(found.model.lm_head.weight, again.model.lm_head.weight)
    assert not torch.equal(found.model.lm_head.weight, other.model.lm_head.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.model.config._name_or_path == "tiny"


def test_the_dtype_of_the_config_holds(place):
    write_model(place / "half", dtype="bfloat16")
    assert compiler.find_model("half").model.dtype == torch.bfloat16


def test_without_architectures_the_bare_model_is_meant(place):
    write_model(place / "bare", architectures=None)
    found = compiler.find_model("bare")
    assert type(found.model) is transformers.LlamaModel
    assert "no field 'architectures'" in found.warnings[0]


def test_unknown_fields_are_named_with_the_nearest(place):
    write_model(place / "typo", hiden_size=32, zzz=1, rope_theta=10000.0, torch_dtype="float32")
    warnings = compiler.find_model("typo").warnings
    assert [each.partition(": ")[2] for each in warnings] == [
        "unknown field 'hiden_size' has no effect: did you mean 'hidden_size' or 'hidden_act'?",
        "unknown field 'zzz' has no effect",
    ]


def test_weights_that_are_missing_are_named(place):
    saved(place)
    weights = place / "saved" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lack model.norm.weight" in compiler.find_model("saved").warnings[0]


def test_a_factory_from_the_current_directory(place):
    import sys

    before = list(sys.path)
    found = compiler.find_model("factories:good")
    assert found.origin == "factory"
    assert type(found.model).__name__ == "Net"
    assert found.example_inputs[0].shape == (3, 8)
    assert compiler.find_model("factories:bare").example_inputs is None
    assert compiler.find_model("factories:Net").model is not compiler.find_model("factories:Net").model
    assert compiler.find_model("factories:instance").model is compiler.find_model("factories:instance").model
    assert sys.path == before


def test_a_factory_draws_from_the_seed(place):
    first, again = (compiler.find_model("factories:bare", seed=3).model.first.weight for _ in range(2))
    assert torch.equal(first, again)


# --- what is refused ---


@pytest.mark.parametrize(
    ("argument", "code", "message", "help"),
    [
        ("./tinny", "E450", "no such directory", "did you mean 'tiny'?"),
        ("./no/such", "E450", "no such directory", "'no' does not exist either"),
        ("tiny/config.json", "E450", "this is a file", "give its directory: 'tiny'"),
        ("factories.py", "E450", "this is a file", "package.module:factory"),
        ("factories.py:good", "E457", "no module named", "leave the .py out"),
        ("", "E450", "no such directory", ""),
        ("a\0b", "E450", "no such directory", ""),
        ("x" * 5000, "E450", "no such directory", ""),
        ("factoris:good", "E457", "no module named 'factoris'", "did you mean 'factories'?"),
        ("factories:god", "E457", "factories has no 'god'", "did you mean 'good'?"),
        ("factories:raising", "E458", "the factory raised: RuntimeError: no such luck", "factories.py:"),
        ("factories:number", "E459", "of type int, not a torch.nn.Module", "return a module"),
        ("factories:odd_inputs", "E459", "example inputs are of type int", "positional"),
    ],
)
def test_bad_arguments(place, argument, code, message, help):
    found = refusal(argument)
    assert found.code == code
    assert message in found.message
    assert help in found.help


def test_a_module_that_fails_on_import(place):
    (place / "broken_module.py").write_text("import not_there_at_all\n")
    (place / "worse_module.py").write_text("raise KeyError('x')\n")
    assert "importing broken_module failed: no module named 'not_there_at_all'" in refusal("broken_module:f").message
    assert "importing worse_module failed: KeyError" in refusal("worse_module:f").message


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("{", "E451", "not valid JSON"),
        ("[]", "E451", "not a JSON object but list"),
        ("\xff", "E451", "not valid JSON"),
        ("[" * 100_000, "E451", "not valid JSON"),
        ("{}", "E452", "no field 'model_type'"),
        ('{"model_type": "lama"}', "E452", "unknown model_type 'lama'"),
        ('{"model_type": 3}', "E452", "unknown model_type 3"),
        ('{"model_type": "llama", "architectures": ["LlamaForCasualLM"]}', "E452", "unknown architecture"),
        ('{"model_type": "llama", "architectures": "x"}', "E452", "not a list of names"),
        ('{"model_type": "llama", "architectures": ["BertModel"]}', "E452", "is of model_type 'bert'"),
        ('{"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}', "E456", "needs code that comes with the model"),
        ('{"model_type": "llama", "hidden_size": "x"}', "E453", "'hidden_size' expected int"),
        ('{"model_type": "llama", "hidden_size": 63}', "E453", "not a multiple"),
    ],
)
def test_bad_configs(place, text, code, message):
    (place / "bad").mkdir()
    (place / "bad" / "config.json").write_bytes(text.encode("latin-1"))
    found = refusal("bad")
    assert found.code == code
    assert message in found.message
    assert "bad/config.json" in found.where


def test_help_for_configs(place):
    write_model(place / "type", model_type="lama")
    write_model(place / "class", architectures=["LlamaForCasualLM"])
    assert "'llama'" in refusal("type").help
    assert "'LlamaForCausalLM'" in refusal("class").help
    assert "--trust-remote-code" in refusal_for_code(place).help


def refusal_for_code(place):
    write_model(place / "code", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    return refusal("code")


def test_code_that_comes_with_a_model_runs_when_trusted(place, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(place / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "cache"))
    monkeypatch.syspath_prepend(str(place / "cache"))
    (place / "own").mkdir()
    (place / "own" / "modeling.py").write_text(
        "import torch\nfrom transformers import PreTrainedConfig, PreTrainedModel\n\n"
        "class MineConfig(PreTrainedConfig):\n    model_type = 'mine'\n\n"
        "class Mine(PreTrainedModel):\n    config_class = MineConfig\n\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.only = torch.nn.Linear(4, 4)\n        self.post_init()\n"
    )
    config = {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {"AutoConfig": "modeling.MineConfig", "AutoModel": "modeling.Mine"},
    }
    (place / "own" / "config.json").write_text(json.dumps(config))
    assert refusal("own").code == "E456"
    assert type(compiler.find_model("own", trust_remote_code=True).model).__name__ == "Mine"


def test_an_adapter_is_no_model(place):
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    assert "this is an adapter's directory" in refusal("adapter").help


def test_damaged_weights(place):
    saved(place)
    weights = place / "saved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert refusal("saved").code == "E454"


def test_no_network_and_not_in_the_cache(place):
    found = refusal("nobody-at-all/no-such-model", local_files_only=True)
    assert (found.code, found.message) == ("E455", "no such directory here, and it is not in the local cache")


def test_the_hub_cannot_be_looked_up(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("peftc.compiler.load_model.pretrained.getproxies", dict)
    found = refusal("tinny")
    assert (found.code, found.help) == ("E455", "did you mean 'tiny'?")
    assert "the Hub cannot be reached" in found.message


# --- inputs ---

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=20,
            max_target_positions=20,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_example_inputs_run(kind):
    model = MODELS[kind]().eval()
    inputs = example_inputs(model)
    with torch.no_grad():
        assert model(**inputs).logits.shape[0] == 2


def test_nothing_is_known_of_a_plain_module():
    assert example_inputs(torch.nn.Linear(2, 2)) is None
