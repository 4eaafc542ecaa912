"""`peftc run` and `peftc bench`: what they print, and that they need no transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from peftc import compiler
from peftc.runtime.artifact.text import Stream, Tokenizer
from tests import artifacts
from tests.artifacts import GENERATION, LOGITS, TOKENS, VOCABULARY, WIDTH, tensor
from tests.compiler.commands.cli_help import peftc
from tests.golden_files import Golden

WORDS = [f"w{index}" for index in range(VOCABULARY)]
PROMPT = "w5 w6 w7"


@pytest.fixture(scope="module")
def program() -> Any:
    return artifacts.speaking_program()


@pytest.fixture(scope="module")
def place(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts: with a tokenizer whose words are numbers, without one, and one that does not generate."""
    directory = tmp_path_factory.mktemp("artifacts")
    (directory / "text").mkdir()
    words = {word: index for index, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(directory / "text" / "tokenizer.json"))
    generation = {**GENERATION, "eos_token_id": []}
    artifacts.write_speaker(directory / "text", program[1], generation=generation)
    artifacts.write_speaker(directory / "numbers", program[1], generation=generation)
    artifacts.write_forward(directory / "forward", artifacts.forward_program())
    return directory


@pytest.fixture(scope="module")
def said(program: Any) -> list[int]:
    """What follows the prompt."""
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        return artifacts.said(program[0], prompt, torch.ones_like(prompt), 6)[0, 3:].tolist()


def test_text_goes_on(place: Path, said: list[int]) -> None:
    done = peftc("run", place / "text", "--prompt", PROMPT, "-n", 6)
    assert done.code == 0
    assert done.out.split() == [WORDS[each] for each in said]
    assert "6 tokens in " in done.err


def test_numbers_go_on(place: Path, said: list[int]) -> None:
    for name in ("text", "numbers"):
        done = peftc("run", place / name, "--ids", "5,6,7", "-n", 6, "--json")
        (found,) = done.json["completions"]
        assert found["ids"] == said
        assert found["prompt_ids"] == [5, 6, 7]
        assert not found["ended"]
        assert done.json["tokens"] == 6
    assert peftc("run", place / "numbers", "--ids", "5,6,7", "-n", 6).out == f"{','.join(map(str, said))}\n"


def test_prompts_of_several_lengths_go_on_together(place: Path, said: list[int]) -> None:
    done = peftc("run", place / "text", "-p", "w9", "-p", PROMPT, "--ids", "5,6,7", "-n", 6)
    shown = [each for each in done.out.splitlines() if each]
    assert [shown[0], shown[2], shown[4]] == ["> w9", f"> {PROMPT}", "> 5,6,7"]
    assert shown[3].split() == [WORDS[each] for each in said]
    assert shown[5] == shown[3]
    assert shown[1] != shown[3]


def test_as_many_as_fit_unless_said(place: Path) -> None:
    assert peftc("run", place / "numbers", "--ids", "5,6,7", "--json").json["tokens"] == 15
    assert peftc("run", place / "numbers", "--ids", "5,6,7", "-n", 16, "--json").codes == ["E622"]


def test_drawing(place: Path) -> None:
    line = ("run", place / "numbers", "--ids", "5,6,7", "--sample", "--temperature", "9", "--seed")
    first, again, other = (peftc(*line, seed).out for seed in (1, 1, 2))
    assert first == again != other
    assert peftc("run", place / "numbers", "--ids", "5", "--top-k", "3").code == 2


MISTAKES: dict[str, tuple[str, ...]] = {
    "no_artifact": ("run", "gone", "--ids", "5"),
    "no_prompt": ("run", "text"),
    "no_tokenizer": ("run", "numbers", "--prompt", "w5"),
    "no_generation": ("run", "forward", "--ids", "5,6"),
    "empty_prompt": ("run", "text", "--prompt", ""),
    "adapter_of_merged": ("run", "text", "--prompt", "w5", "--adapter", "support"),
    "bench_too_many_tokens": ("bench", "text", "--tokens", "17"),
    "bench_no_artifact": ("bench", "."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    monkeypatch.chdir(place)
    done = peftc(*MISTAKES[name])
    golden("artifacts/command_line.txt", f"{done.err}exit code {done.code}\n", name)
    assert done.out == ""
    assert peftc(*MISTAKES[name], "--json").codes


def test_what_is_no_number_is_wrong_usage(place: Path) -> None:
    assert peftc("run", place / "numbers", "--ids", "5,six").code == 2


def test_changed_files_are_noticed_unless_said(place: Path, tmp_path: Path) -> None:
    for each in (place / "text").iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"w31"', '"v31"'))
    assert peftc("run", tmp_path, "-p", "w5", "--json").codes == ["E604"]
    assert peftc("run", tmp_path, "-p", "w5", "--no-verify").code == 0
    (tmp_path / "tokenizer.json").write_text("{" + text[1:].replace("WordLevel", "WordLeven"))
    assert peftc("run", tmp_path, "-p", "w5", "--no-verify", "--json").codes == ["E606"]


def test_text_comes_in_whole_characters(tmp_path: Path) -> None:
    """Each token of a byte-level vocabulary is one byte; of the parts of a character nothing is said."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {each: index for index, each in enumerate(sorted(alphabet))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    text = " größer: 日本 🙂!"
    stream = Stream(tokenizer, tokenizer.encode("was"))
    pieces = [stream.add(each) for each in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert [each for each in pieces if each] == list(text)
    assert stream.rest() == ""
    stream.add(tokenizer.encode("🙂")[0])
    assert stream.rest() == "�"


def test_words_keep_the_spaces_between_them(tmp_path: Path) -> None:
    vocabulary = {"▁a": 0, "▁b": 1, "c": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="c"))
    made.decoder = tokenizers.decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    stream = Stream(Tokenizer(tmp_path), [0])
    assert [stream.add(each) for each in (1, 2, 0)] == [" b", "c", " a"]


def test_bench_measures_every_entry(place: Path) -> None:
    done = peftc("bench", place / "text", "--seconds", 0, "--tokens", 4, "--tokens", 8, "--batch", 3)
    assert done.code == 0
    rows = [each.split() for each in done.out.splitlines() if each.split()[:1] in (["prefill"], ["decode"])]
    assert [each[:4] for each in rows] == [
        ["prefill", "3", "0", "4"],
        ["prefill", "3", "0", "8"],
        ["decode", "3", "4", "1"],
        ["decode", "3", "8", "1"],
    ]
    (timing,) = peftc("bench", place / "forward", "--seconds", 0, "--tokens", 8, "--json").json["timings"]
    assert timing["entry"] == "forward"
    assert timing["sizes"] == {"batch": 1, "sequence": 8}
    assert timing["tokens_per_second"] == pytest.approx(8 / timing["milliseconds"] * 1000)


def test_bench_fits_what_nobody_asked_for(place: Path) -> None:
    facts = compiler.bench(place / "text", seconds=0)
    assert [(each.entry, each.sizes["past"] + each.sizes["sequence"]) for each in facts.timings] == [
        ("prefill", 16),
        ("decode", 17),
    ]


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"transformers", "peft", "safetensors", "huggingface_hub"}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from peftc.runtime.artifact.artifact import Artifact

print(Artifact.load(sys.argv[1]).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6).tolist())
artifact = Artifact.load(sys.argv[2])
adapter = artifact.adapter("a")
print(artifact("forward", {"input_ids": torch.tensor([[3, 4, 5]]), "adapter": adapter})["logits"].tolist())
assert not {"lark", "typer", "rich"} & set(sys.modules)

from peftc.compiler.commands.cli import app

for line in (["run", "--prompt", "w5 w6 w7", "-n", "6"], ["bench", "--seconds", "0", "--json"]):
    try:
        app([*line, sys.argv[1]])
    except SystemExit as error:
        assert not error.code, line
"""


def test_torch_is_enough(place: Path, said: list[int], tmp_path: Path) -> None:
    """In a process where neither transformers nor peft nor safetensors can be imported."""
    torch.manual_seed(1)
    adapter = {"a.A": torch.randn(2, WIDTH), "a.B": torch.randn(WIDTH, 2)}
    (tmp_path / "adapters").mkdir()
    save_file(adapter, tmp_path / "adapters" / "a.safetensors")
    group = {"name": "adapter", "tensors": [tensor("a.A", 2, WIDTH), tensor("a.B", WIDTH, 2)]}
    entry = {"file": "forward.pt2", "inputs": [TOKENS, group], "outputs": [LOGITS], "state": {}}
    artifacts.write_forward(
        tmp_path,
        artifacts.adapter_program(),
        adapters="inputs",
        adapter_names=["a"],
        adapter_files={"a": "adapters/a.safetensors"},
        entries={"forward": entry},
    )
    command = [sys.executable, "-c", ALONE, str(place / "text"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids, logits, text, *document = done.stdout.splitlines()
    assert json.loads(ids) == [[5, 6, 7, *said]]
    torch.manual_seed(0)
    wanted = artifacts.Forward()(torch.tensor([[3, 4, 5]]), adapter)["logits"]
    torch.testing.assert_close(torch.tensor(json.loads(logits)), wanted)
    assert text.split() == [WORDS[each] for each in said]
    assert json.loads("".join(document))["backend"] == "pt2"
