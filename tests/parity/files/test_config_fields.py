"""adapter_config.json as it is found, and as it is written: peft's own classes are what it is held against."""

import copy
import json
import warnings
from dataclasses import fields as fields_of
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError
from peftc.grammar.spec.library import builtin_methods
from peftc.passes.foreign import peft as foreign
from peftc.runtime.peft_format.adapter_files import CONFIG
from tests import zoo
from tests.parity.cases.case import Case
from tests.parity.method_cases import CASES, batch, make_base, moved
from tests.zoo import TEXT, WIDTHS

CLASSES = {
    kind.value: {each.name for each in fields_of(config)} for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
}
HEAD = dict(max_position_embeddings=64)

# --- what is found ---


@pytest.fixture
def theirs(tmp_path):
    model = zoo.make("llama")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.save_pretrained(tmp_path)
    return model, wrapped


def change(directory: Path, **fields: object) -> None:
    file = directory / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


NEWER = {"frobnicate_alpha": 1.0, "new_mode": "standard", "nested": {"rho": 2.0}, "peft_version": "0.99.0"}
OTHERS = {"_from_model_config": True, "transformers_version": "4.33.2", "return_dict": True, "unsloth_fixed": [1]}


@pytest.mark.parametrize("extra", [NEWER, OTHERS], ids=["newer", "others"])
def test_unknown_fields_are_told_in_one_warning(extra, theirs, tmp_path):
    model, wrapped = theirs
    change(tmp_path, **extra)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = compiler.load(model, tmp_path).eval()
    said = [str(each.message) for each in told if "not known here" in str(each.message)]
    unknown = set(extra) - {"peft_version"}
    assert len(said) == 1
    assert all(f"'{name}' = " in said[0] for name in unknown)
    assert_close(adapted(**batch()).logits, wrapped(**batch()).logits)


def ways(model, directory):
    beside = compiler.apply(model, "adapter other = lora(rank = 2) { on q_proj }")
    yield lambda **options: compiler.load(model, directory, **options)
    yield lambda **options: beside.load_adapter(directory, "named", **options)
    yield lambda **options: compiler.AdaptedModel.from_pretrained(model, directory, **options)


@pytest.mark.parametrize("way", range(3), ids=["load", "load_adapter", "from_pretrained"])
@pytest.mark.filterwarnings("ignore")
def test_strictly_they_are_refused(way, theirs, tmp_path):
    change(tmp_path, frobnicate_alpha=1.0, lora_alhpa=3)
    load = list(ways(theirs[0], tmp_path))[way]
    with pytest.raises(CheckpointError) as caught:
        load(strict=True)
    text = str(caught.value)
    assert text.count("E323") == 2
    assert "did you mean 'lora_alpha'" in text
    load()


def test_what_is_known_and_not_supported_is_always_refused(theirs, tmp_path):
    change(tmp_path, layer_replication=[[0, 1]], frobnicate_alpha=1.0)
    with pytest.raises(CheckpointError) as caught:
        compiler.load(theirs[0], tmp_path)
    assert [each.code for each in caught.value.diagnostics] == ["E322"]


def test_switches_that_are_off_are_not_told(theirs, tmp_path):
    change(tmp_path, use_superlora=False, superlora_config=None, superlora_targets=[], enable_lora=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler.load(theirs[0], tmp_path, strict=True)


def test_a_method_of_our_own(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    spec = 'method mine() { on linear param P[out, in] = ones saved "p" W\' = P * W } adapter a = mine { on "0" }'
    compiler.apply(model, spec).save_pretrained(tmp_path)
    change(tmp_path, frobnicate_alpha=1.0)
    with pytest.warns(UserWarning, match="'frobnicate_alpha' = 1.0"):
        compiler.load(model, tmp_path)
    with pytest.raises(CheckpointError, match="E323"):
        compiler.load(model, tmp_path, strict=True)


def test_a_field_given_by_hand_is_no_files(theirs, tmp_path):
    adapted = compiler.load(theirs[0], tmp_path)
    with pytest.raises(CheckpointError, match="E323"):
        adapted.add_adapter({"peft_type": "LORA", "target_modules": ["q_proj"], "frobnicate_alpha": 1.0}, "b")


# --- what is written ---


@pytest.mark.parametrize("name", [*foreign.HAVING, "modules_to_save"])
def test_the_table_of_fields_is_pefts(name):
    having = {kind for kind, names in CLASSES.items() if name in names}
    written = {rule.peft_type for rule in builtin_methods().values()} & set(CLASSES)
    ours = set(CLASSES) - foreign.NO_COPIES if name == "modules_to_save" else foreign.HAVING[name]
    assert ours & written == having & written
    assert foreign.HAVING.get(name, ours) <= set(CLASSES)


def check_known(directory: Path) -> None:
    """peft's class of the type has every field, and does not say that it has not."""
    fields = json.loads((directory / CONFIG).read_text())
    if fields["peft_type"] == foreign.OWN_TYPE:
        return
    assert set(fields) <= CLASSES[fields["peft_type"]]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read = peft.PeftConfig.from_pretrained(directory)
    assert not [each for each in told if "nexpected" in str(each.message)]
    assert read.peft_type.value == fields["peft_type"]


@pytest.fixture(scope="module")
def llama():
    return make_base("llama")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [each for each in CASES if "llama" in each.models], ids=lambda case: case.name)
def test_of_every_method(case: Case, llama, tmp_path) -> None:
    name, _, adapted = llama
    adapted.add_adapter(case.spec(name), "default", calibration=[batch()])
    try:
        adapted.save_pretrained(tmp_path)
    finally:
        adapted.delete_adapter("default")
    check_known(tmp_path)


FRONTS = (
    *("prompt(length = 4)", "prefix(length = 4)", "ptuning(length = 4)", "cartridge(length = 4)"),
    *("multitask_prompt(length = 4)", "adaption_prompt(length = 2, layers = 1)"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [*FRONTS, "trainable_tokens { tokens [3, 5] }", "ln_tuning { on norm }"])
def test_of_other_kinds(method, tmp_path):
    compiler.apply(zoo.make("llama"), f"adapter default = {method}").save_pretrained(tmp_path)
    check_known(tmp_path)


def test_what_a_class_lacks_and_the_adapter_needs_is_written(tmp_path):
    """It is not PEFT's, who says so on reading it; here it comes back."""
    model = zoo.make("bert")
    adapted = moved(
        compiler.apply(model, "adapter default = ia3 { on {query, value}  bias adapter }"), "adapter_bank", 0.3
    )
    adapted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "ia3_only"
    assert torch.equal(compiler.load(model, tmp_path).eval()(**batch()).logits, adapted.eval()(**batch()).logits)


# --- the task, and the class of the base ---

AUTO = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    None: peft.AutoPeftModel,
}


def bert(kind):
    return lambda: kind(hf.BertConfig(**TEXT, **HEAD))


def llava():
    vision, text = hf.CLIPVisionConfig(**WIDTHS, image_size=28, patch_size=14), hf.LlamaConfig(**TEXT)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=70))


PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
MODELS = {
    "llama": (lambda: zoo.make("llama"), "on q_proj", "CAUSAL_LM"),
    "gpt2": (lambda: zoo.make("gpt2"), "on c_attn", "CAUSAL_LM"),
    "t5": (lambda: zoo.make("t5"), "on q", "SEQ_2_SEQ_LM"),
    "classifier": (bert(hf.BertForSequenceClassification), "on query  train classifier", "SEQ_CLS"),
    "classifier, as it is": (bert(hf.BertForSequenceClassification), "on query", None),
    "of tokens": (bert(hf.BertForTokenClassification), "on query  train classifier", "TOKEN_CLS"),
    "of tokens, as it is": (bert(hf.BertForTokenClassification), "on query", None),
    "answers": (bert(hf.BertForQuestionAnswering), "on query  train qa_outputs", "QUESTION_ANS"),
    "answers, as they are": (bert(hf.BertForQuestionAnswering), "on query", None),
    "bare": (bert(hf.BertModel), "on query", "FEATURE_EXTRACTION"),
    "bare t5": (lambda: hf.T5Model(hf.T5Config(**zoo.T5)), "on q", "FEATURE_EXTRACTION"),
    "masked": (bert(hf.BertForMaskedLM), "on query", None),
    "images": (lambda: zoo.make("vit"), "on q_proj", None),
    "images, bare": (lambda: hf.ViTModel(hf.ViTConfig(**WIDTHS, image_size=16, patch_size=4)), "on q_proj", None),
    "images and text": (llava, "on q_proj", None),
}


def call(model):
    with torch.no_grad():
        if "vit" in model.config.model_type:
            return model(**PIXELS)[0]
        extra = {"decoder_input_ids": batch()["input_ids"][:, :3]} if model.config.is_encoder_decoder else {}
        return model(**batch(), **extra)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_pefts_auto_class_finds_the_base(name, tmp_path):
    make, clauses, task = MODELS[name]
    torch.manual_seed(0)
    made = make()
    made.save_pretrained(tmp_path / "base")
    base = type(made).from_pretrained(tmp_path / "base").eval()
    adapted = moved(
        compiler.apply(base, f"adapter default = lora(rank = 2) {{ {clauses} }}"), "adapter_bank", 0.3
    ).eval()
    adapted.save_pretrained(tmp_path / "out")
    fields = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert fields["task_type"] == task
    assert ("auto_mapping" in fields) == (task is None)
    check_known(tmp_path / "out")
    back = AUTO[task].from_pretrained(tmp_path / "out").eval()
    assert type(back.get_base_model()) is type(made)
    assert_close(call(back.base_model.model), call(adapted))
    wanted = set(adapted.adapter_state_dict("default"))
    trained = AUTO[task].from_pretrained(tmp_path / "out", is_trainable=True)
    assert set(peft.get_peft_model_state_dict(trained)) == wanted
    assert sum(each.requires_grad for each in trained.parameters()) == len(wanted)


def test_a_task_that_a_file_says_is_kept(theirs, tmp_path):
    change(tmp_path, task_type="FEATURE_EXTRACTION")
    compiler.load(theirs[0], tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["task_type"] == "FEATURE_EXTRACTION"


def test_a_model_that_is_not_transformers(tmp_path):
    compiler.apply(nn.Sequential(nn.Linear(4, 4)), 'adapter default = lora(rank = 2) { on "0" }').save_pretrained(
        tmp_path
    )
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["task_type"] is None
    assert fields["auto_mapping"] == {"base_model_class": "Sequential", "parent_library": "torch.nn.modules.container"}
