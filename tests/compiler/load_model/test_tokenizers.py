"""Which tokenizer a spec's tokens are looked up in, when nobody passes one."""

import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers

from peftc import compiler
from peftc.compiler.load_model.models import find_model
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.elaborate import read_spec

BARE = Path(__file__).parents[3] / "examples" / "tiny-llama"
TEXTS = 'adapter a = trainable_tokens { tokens ["<tool>", "w3"] }'
IDS = "adapter a = trainable_tokens { tokens [5] }"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer beside it that has a token more."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(BARE, path)
    size = find_model(BARE).model.config.vocab_size
    words = {**{f"w{index}": index for index in range(size - 1)}, "<unk>": size - 1}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    made.add_tokens(["<tool>"])
    made.save_pretrained(path)
    return path


def test_the_models_own(directory: Path) -> None:
    found = find_model(directory)
    assert tokenizer_for(read_spec(IDS), found) is None
    tokenizer = tokenizer_for(read_spec(TEXTS), found)
    size = found.model.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<tool>") == size
    facts, problems = compiler.check_fit(read_spec(TEXTS), found)
    assert not problems
    assert {rule.rule for rule in facts[0].rules} == {f"tokens [{size}, 3]"}
    assert {name for rule in facts[0].rules for name in rule.sites} == {"model.embed_tokens", "lm_head"}


def test_one_that_is_not_there() -> None:
    with pytest.raises(SpecError) as caught:
        tokenizer_for(read_spec(TEXTS), find_model(BARE))
    (found,) = caught.value.diagnostics
    assert found.code == "E227"
    assert found.span is not None
    assert found.span.text == 'tokens ["<tool>", "w3"]'
    _, problems = compiler.check_fit(read_spec(TEXTS), find_model(BARE).model)
    assert [each.code for each in problems] == ["E227"]
