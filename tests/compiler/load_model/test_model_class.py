"""The class a model is loaded with: config.json's, one asked for, or the one that adapters were made for."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from peftc import compiler
from peftc.compiler.load_model.model_class import choose_class
from peftc.compiler.load_model.wanted import Told, Wanted
from peftc.passes.foreign.peft import AUTO_CLASSES
from tests.compiler.commands.cli_help import peftc, write_model

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40)
IDS = torch.tensor([[2, 5, 9, 3, 8, 7, 3]])


@pytest.fixture
def encoder(place):
    """A directory that holds a bare encoder."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES, initializer_range=0.3)).save_pretrained("bert")
    return "bert"


@pytest.fixture
def decoder(place):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    return "llama"


def stirred(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each) * 0.3)
    return model.eval()


def theirs(model, where, **options):
    """A checkpoint that peft wrote, and what its model says."""
    adapted = stirred(peft.get_peft_model(model, peft.LoraConfig(r=2, **options)))
    adapted.save_pretrained(where)
    with torch.no_grad():
        return adapted(IDS)[0]


def outputs(adapted):
    with torch.no_grad():
        return adapted.eval()(IDS)[0]


def refused(*arguments, **options):
    with pytest.raises(compiler.ModelError) as caught:
        compiler.find_model(*arguments, **options)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E468"
    return diagnostic


# --- what was asked for ---


def test_a_class_or_a_task_that_is_asked_for(encoder):
    for options in ({"class_name": "BertForSequenceClassification"}, {"task": "SEQ_CLS"}):
        found = compiler.find_model(encoder, **options)
        assert type(found.model) is transformers.BertForSequenceClassification
        want = transformers.BertModel.from_pretrained(encoder).encoder.layer[0].attention.self.query.weight
        assert torch.equal(found.model.bert.encoder.layer[0].attention.self.query.weight, want)
        assert "classifier.weight" in found.warnings[0]  # which is random
        assert "names BertModel" in found.notes[0]


@pytest.mark.parametrize("task", AUTO_CLASSES)
def test_every_task_is_the_class_that_transformers_has_for_it(place, task):
    config = (transformers.BartConfig if task == "SEQ_2_SEQ_LM" else transformers.BertConfig)()
    want = getattr(transformers, AUTO_CLASSES[task])._model_mapping[type(config)]
    choice = choose_class(config.to_dict(), place, False, Wanted(task=task))
    assert choice.kind is (want[0] if isinstance(want, tuple) else want)
    assert hasattr(peft.TaskType, task)


def test_the_tasks_are_those_of_peft():
    assert set(AUTO_CLASSES) == {each.value for each in peft.TaskType}


def test_a_directory_with_only_a_config_has_the_class_too(place):
    found = compiler.find_model("tiny", task="TOKEN_CLS")
    assert type(found.model) is transformers.LlamaForTokenClassification
    assert len(found.notes) == 2


def test_its_own_class_asked_for_says_nothing(decoder):
    for options in ({"class_name": "LlamaForCausalLM"}, {"task": "CAUSAL_LM"}, {}):
        found = compiler.find_model(decoder, **options)
        assert (type(found.model), found.notes, found.warnings) == (transformers.LlamaForCausalLM, (), ())


def test_a_class_for_a_part_of_the_model(place):
    part = {**SIZES, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(text_config=part, vision_config={**part, "image_size": 8, "patch_size": 4})
    torch.manual_seed(0)
    whole = transformers.CLIPModel(config)
    whole.save_pretrained("clip")
    found = compiler.find_model("clip", class_name="CLIPTextModel").model
    assert type(found) is transformers.CLIPTextModel
    for name, each in found.named_parameters():
        assert torch.equal(each, whole.get_parameter(name if name.startswith("text_model") else f"text_model.{name}"))
    write_model(place / "drawn", **json.loads((place / "clip" / "config.json").read_text()))
    assert compiler.find_model("drawn", class_name="CLIPTextModel").model.config.hidden_size == 16


@pytest.mark.parametrize(
    ("options", "message", "help"),
    [
        ({"class_name": "BertForSequenceClasification"}, "unknown architecture", "BertForSequenceClassification"),
        ({"class_name": "BertConfig"}, "unknown architecture", "BertModel"),
        ({"class_name": "torch"}, "unknown architecture", "BertModel"),
        ({"class_name": "GPT2Model"}, "of model_type 'gpt2', not 'bert'", "BertModel"),
        ({"class_name": "BertPreTrainedModel"}, "in common", "BertModel"),
        ({"task": "SEQCLS"}, "no task 'SEQCLS'", "SEQ_CLS"),
        ({"task": "SEQ_2_SEQ_LM"}, "no class for SEQ_2_SEQ_LM of model_type 'bert'", "SEQ_CLS"),
        ({"task": "SEQ_CLS", "class_name": "BertModel"}, "both a class", "one of the two"),
    ],
)
def test_what_does_not_fit_says_why(encoder, options, message, help):
    found = refused(encoder, **options)
    assert message in found.message
    assert help in found.help


def test_a_factory_makes_its_own_class(place):
    assert "factory" in refused("factories:good", class_name="BertModel").message
    assert "factory" in refused("factories:good", task="SEQ_CLS").message


def test_code_that_comes_with_a_model_is_never_looked_for_by_name(place):
    write_model(place / "own", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    for trusted in (False, True):
        found = refused("own", class_name="Mine", trust_remote_code=trusted)
        assert "code of its own" in found.message
    assert "no class for SEQ_CLS" in refused("own", task="SEQ_CLS", trust_remote_code=True).message
    config = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.Mine", "AutoModel": "m.Bare"}}
    config["architectures"] = ["Bare"]
    assert choose_class(config, place, True, Wanted(task="CAUSAL_LM")).kind is transformers.AutoModelForCausalLM
    told = Wanted(told=Told("it", ("Mine",)))
    assert choose_class(config, place, True, told).kind is transformers.AutoModelForCausalLM
    assert choose_class(config, place, True).kind is transformers.AutoModel


# --- what a checkpoint was made for ---


def test_what_peft_wrote_for_a_task(decoder):
    model = transformers.LlamaForSequenceClassification.from_pretrained(decoder, num_labels=4)
    want = theirs(model, "theirs", target_modules=["q_proj"], task_type="SEQ_CLS")
    found = compiler.find_model(decoder, adapters="theirs")
    assert type(found.model) is transformers.LlamaForSequenceClassification
    assert "of 4 labels" in found.notes[0]
    assert found.warnings == ()  # the head that the directory lacks is in the checkpoint
    torch.testing.assert_close(outputs(compiler.load(found.model, "theirs")), want)


@pytest.mark.parametrize("kind", ["ForTokenClassification", "ForQuestionAnswering", "ForNextSentencePrediction"])
def test_what_peft_wrote_without_a_task(encoder, kind):
    """The file's auto_mapping names the class."""
    model = getattr(transformers, f"Bert{kind}").from_pretrained(encoder)
    head = {
        "ForTokenClassification": "classifier",
        "ForQuestionAnswering": "qa_outputs",
        "ForNextSentencePrediction": "cls",
    }[kind]
    want = theirs(model, "theirs", target_modules=["query", "value"], modules_to_save=[head])
    assert json.loads(Path("theirs/adapter_config.json").read_text())["task_type"] is None
    found = compiler.find_model(encoder, adapters="theirs")
    torch.testing.assert_close(outputs(compiler.load(found.model, "theirs")), want)


@pytest.mark.parametrize(("kind", "outer"), [("LlamaModel", False), ("LlamaForCausalLM", True)])
def test_features_of_a_bare_model_or_of_one_with_a_head(decoder, kind, outer):
    """PEFT's task for features is named for both; the keys in the file say which it was."""
    model = getattr(transformers, kind).from_pretrained(decoder)
    want = theirs(model, "theirs", target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    found = compiler.find_model(decoder, adapters="theirs")
    assert type(found.model).__name__ == kind
    torch.testing.assert_close(outputs(compiler.load(found.model, "theirs")), want)


def test_what_we_wrote_for_a_head(encoder):
    base = transformers.BertForSequenceClassification.from_pretrained(encoder, num_labels=3).eval()
    adapted = stirred(compiler.apply(base, "adapter default = lora(rank = 2) { on query train classifier }"))
    adapted.save_pretrained("ours")
    found = compiler.find_model(encoder, adapters="ours")
    torch.testing.assert_close(outputs(compiler.load(found.model, "ours")), outputs(adapted))


def test_a_checkpoint_for_the_directory_s_own_class_or_for_none_changes_nothing(decoder):
    model = transformers.LlamaForCausalLM.from_pretrained(decoder)
    theirs(model, "theirs", target_modules=["q_proj"], task_type="CAUSAL_LM")
    found = compiler.find_model(decoder, adapters="theirs")
    assert (type(found.model), found.notes) == (transformers.LlamaForCausalLM, ())
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for told in (
        Told("it", ("Net",)),
        Told("it", ("BertModel",)),
        Told("it", task="SEQ_2_SEQ_LM"),
        Told("it", task="x"),
    ):
        choice = choose_class(config, Path("llama"), False, Wanted(told=told))
        assert choice.is_own
        assert choice.warnings == ()


def test_what_was_asked_for_wins_over_the_checkpoint_and_has_its_labels(encoder):
    model = transformers.BertForTokenClassification.from_pretrained(encoder, num_labels=5)
    theirs(model, "theirs", target_modules=["query"], modules_to_save=["classifier"])
    found = compiler.find_model(encoder, class_name="BertForSequenceClassification", adapters="theirs")
    assert type(found.model) is transformers.BertForSequenceClassification
    assert found.model.config.num_labels == 5


def test_of_several_checkpoints_the_first_that_says_something(encoder):
    model = transformers.BertForSequenceClassification.from_pretrained(encoder, num_labels=5)
    theirs(model, "head", target_modules=["query"], modules_to_save=["classifier"])
    theirs(transformers.BertModel.from_pretrained(encoder), "silent", target_modules=["query"])
    written = Path("silent/adapter_config.json")
    written.write_text(json.dumps({**json.loads(written.read_text()), "auto_mapping": None}))
    found = compiler.find_model(encoder, adapters={"a": "silent", "b": "head"})
    assert type(found.model) is transformers.BertForSequenceClassification


def test_a_checkpoint_that_is_not_there_or_damaged_is_refused_first(encoder, place):
    with pytest.raises(compiler.CheckpointError, match="no such directory"):
        compiler.find_model(encoder, adapters=place / "absent")
    theirs(transformers.BertModel.from_pretrained(encoder), "theirs", target_modules=["query"])
    (place / "theirs" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(compiler.CheckpointError, match="damaged"):
        compiler.find_model(encoder, adapters="theirs")


# --- what a spec demands ---

SPEC = "base {{ {} }}\nadapter a = lora(rank = 2) {{ on query train classifier }}\n"


def test_a_spec_s_architecture_chooses_where_a_directory_allows_several(encoder, place):
    (place / "head.adapter").write_text(SPEC.format('architecture = "BertForSequenceClassification"'))
    assert peftc("check", "head.adapter", encoder).code == 0
    built = compiler.build("head.adapter", encoder)
    assert built.facts.model.architecture == "BertForSequenceClassification"
    assert compiler.explain("head.adapter", encoder).architecture == "BertForSequenceClassification"


def test_a_spec_may_say_how_many_labels(encoder, place):
    (place / "head.adapter").write_text(SPEC.format('architecture = "BertForSequenceClassification", num_labels = 7'))
    assert peftc("check", "head.adapter", encoder).code == 0
    found = compiler.find_model(encoder, adapters=compiler.read_spec("head.adapter"))
    assert found.model.classifier.out_features == 7


def test_a_spec_s_class_above_the_directory_s_own_is_its_own(decoder):
    spec = compiler.read_spec('base { architecture = "LlamaPreTrainedModel" } adapter a = lora() { on q_proj }')
    assert type(compiler.find_model(decoder, adapters=spec).model) is transformers.LlamaForCausalLM


def test_a_spec_s_class_that_does_not_fit_says_why(encoder, place):
    (place / "head.adapter").write_text(SPEC.format('architecture = "GPT2ForSequenceClassification"'))
    done = peftc("check", "head.adapter", encoder)
    assert done.code == 1
    assert "is of model_type 'gpt2', not 'bert'" in done.err
    assert "error[E241]" in done.err


# --- the command line ---


@pytest.mark.parametrize("command", ["compile", "check", "explain", "graph", "drift", "export"])
def test_every_command_that_loads_a_model_has_the_options(command, encoder, place):
    (place / "head.adapter").write_text("adapter a = lora(rank = 2) { on query train classifier }\n")
    more = ("-o", "out") if command == "export" else ()
    assert peftc(command, "head.adapter", encoder, *more).code == 1  # the bare encoder has no classifier
    for option in (("--class", "BertForSequenceClassification"), ("--task", "TOKEN_CLS")):
        done = peftc(command, "head.adapter", encoder, *option, *more, *(("--force",) if more else ()))
        assert done.code == 0, done.err
    assert peftc(command, "head.adapter", encoder, "--class", "GPT2Model", *more, "--json").codes == ["E468"]


def test_export_writes_the_class_of_the_checkpoint(decoder):
    model = transformers.LlamaForSequenceClassification.from_pretrained(decoder, num_labels=4)
    want = theirs(model, "theirs", target_modules=["q_proj"], task_type="SEQ_CLS")
    done = peftc("export", "theirs", decoder, "-o", "out")
    assert done.code == 0, done.err
    plain = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, want, rtol=1e-4, atol=1e-5)
