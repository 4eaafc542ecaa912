"""Prompts that start as tokens, drawn or of a text, against PEFT with the same tokenizer."""

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers as hf

from peftc import compiler
from peftc.grammar.diagnostics import UsageError

NAMES = ("llama", "gemma3")  # one whose embeddings are scaled
KEY = "prompt_embeddings"


def _tokenizer(extra: int = 0) -> Any:
    """Knows w0, w1, ... and puts a start in front, as tokenizers do."""
    words = {"<s>": 1, "<unk>": 2, **{f"w{each}": 3 + each + extra for each in range(20)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if not extra:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    _tokenizer().save_pretrained(folder)
    return folder


def _spec(text: str, place: Path | str, length: int = 5) -> str:
    return f'adapter a = prompt(length = {length}, init = "text", text = "{text}", tokenizer = "{place}")'


def _theirs(base: Any, **fields: Any) -> torch.Tensor:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **fields)
    return peft.get_peft_model_state_dict(peft.get_peft_model(copy.deepcopy(base), config))[KEY]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["w3 w9", "w1 w2 w3 w4 w5 w6 w7"])  # to be repeated, and to be cut
def test_a_text(name: str, text: str, place: Path, zoo: Any) -> None:
    base, fields = zoo.model(name), {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
    wanted = _theirs(base, **fields, tokenizer_name_or_path=str(place))
    ours = compiler.apply(base, _spec(text, place))
    assert torch.equal(ours.adapter_state_dict("a")[KEY], wanted)
    # The tokenizer that is given comes first: the one named is not looked at.
    ours.add_adapter(_spec(text, "no/such").replace("a =", "b ="), tokenizer=_tokenizer())
    assert torch.equal(ours.adapter_state_dict("b")[KEY], wanted)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, **fields, tokenizer_name_or_path=str(place)
    )
    ours.add_adapter(config, "c")
    assert torch.equal(ours.adapter_state_dict("c")[KEY], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_drawn_tokens(name: str, zoo: Any) -> None:
    base = zoo.model(name)
    torch.manual_seed(3)
    wanted = _theirs(base, prompt_tuning_init="SAMPLE_VOCAB")
    torch.manual_seed(3)
    torch.nn.Embedding(*wanted.shape)  # which PEFT draws first, and drops
    ours = compiler.apply(base, 'adapter a = prompt(length = 5, init = "sample")')
    assert torch.equal(ours.adapter_state_dict("a")[KEY], wanted)


def test_scaled_embeddings_of_half_precision_are_rounded_as_the_module_rounds(zoo: Any) -> None:
    base = copy.deepcopy(zoo.model("gemma3")).bfloat16()
    torch.manual_seed(3)
    wanted = _theirs(base, prompt_tuning_init="SAMPLE_VOCAB")
    torch.manual_seed(3)
    torch.nn.Embedding(*wanted.shape)
    ours = compiler.apply(base, 'adapter a = prompt(length = 5, init = "sample")')
    assert torch.equal(ours.adapter_state_dict("a")[KEY], wanted)


def test_a_checkpoint_needs_no_tokenizer(zoo: Any, place: Path, tmp_path: Path) -> None:
    base, gone = zoo.model("llama"), tmp_path / "gone"
    shutil.copytree(place, gone)
    ours = compiler.apply(base, _spec("w3", gone))
    ours.save_pretrained(tmp_path / "saved")
    wanted = ours.adapter_state_dict("a")[KEY]
    shutil.rmtree(gone)
    read = compiler.load(base, tmp_path / "saved", adapter_name="a")
    assert torch.equal(read.adapter_state_dict("a")[KEY], wanted)
    assert torch.equal(zoo.reference("llama", tmp_path / "saved").get_prompt(1)[0], wanted)


def test_what_is_no_start(zoo: Any, place: Path, tmp_path: Path) -> None:
    base = zoo.model("llama")
    for spec, tokenizer, code in (
        (_spec("w3", tmp_path / "none"), None, "E565"),
        (_spec("w3", place), "w3", "E565"),
        (_spec("", place), _tokenizer(extra=1), "E566"),
        (_spec("w3", place), _tokenizer(extra=10**6), "E566"),
    ):
        with pytest.raises(UsageError) as caught:
            compiler.apply(base, spec, tokenizer=tokenizer)
        assert caught.value.diagnostics[0].code == code
