"""Tokens generated from an artifact are those that transformers' `generate` gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from peftc import compiler
from peftc.runtime.artifact.artifact import Artifact
from peftc.runtime.artifact.sampling import Sampling
from tests import artifacts
from tests.artifacts import GENERATION, HEADS, SIZE, SPEAKING, VOCABULARY, WIDTH, tensor

PADDED = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7], [0, 9, 8, 7, 6]])


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    module, program = artifacts.speaking_program()
    return module, Artifact.load(artifacts.write_speaker(tmp_path_factory.mktemp("speaker"), program))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    adapted = compiler.apply(model, "adapter a = lora(rank = 4) { on q_proj, v_proj, down_proj }").eval()
    for each in adapted.adapter_bank.parameters():
        nn.init.normal_(each, std=0.3)
    directory = tmp_path_factory.mktemp("llama") / "artifact"
    adapted.export(directory, format="pt2")
    return adapted, Artifact.load(directory)


def test_tokens_of_a_batch_are_those_of_transformers(llama):
    adapted, artifact = llama
    single, mask = torch.tensor([[9, 30, 5, 17]]), (PADDED != 0).long()
    free = artifact.generate(PADDED, mask, max_new_tokens=20, eos_token_id=())
    ends = [int(free[0, 8]), int(free[1, 15])]
    for ids, given in ((single, None), (PADDED, mask), (PADDED, None)):
        for stop in (ends, 2):
            with torch.no_grad():
                wanted = adapted.generate(
                    input_ids=ids, attention_mask=given, max_new_tokens=20, do_sample=False, eos_token_id=stop
                )
            found = artifact.generate(ids, given, max_new_tokens=20, eos_token_id=stop)
            assert torch.equal(found, wanted)
    stopped = artifact.generate(PADDED, mask, max_new_tokens=20, eos_token_id=ends)
    assert not torch.equal(stopped, free[:, : stopped.shape[1]])  # it is padded from where it ended


def test_padding_changes_nothing(speaker):
    module, artifact = speaker
    mask = (PADDED != 0).long()
    with torch.no_grad():
        wanted = artifacts.said(module, PADDED, mask, 8)
    assert torch.equal(artifact.generate(PADDED, mask, max_new_tokens=8, eos_token_id=()), wanted)
    alone = artifact.generate(PADDED[:1, 2:], max_new_tokens=8, eos_token_id=())
    assert torch.equal(alone[0, 3:], wanted[0, 5:])


def test_a_row_that_has_ended_is_padded_and_all_ended_stops(speaker):
    artifact = speaker[1]
    free = artifact.generate(PADDED, max_new_tokens=8, eos_token_id=())[:, 5:]
    last = int(free[0, 2])
    ended = artifact.generate(PADDED, max_new_tokens=8, eos_token_id=last)[:, 5:]
    for row, each in enumerate(free.tolist()):
        until = each.index(last) + 1 if last in each else len(each)
        assert ended[row].tolist()[:until] == each[:until]
        assert set(ended[row].tolist()[until:]) <= {0}
    everything = tuple(range(VOCABULARY))
    assert artifact.generate(PADDED, max_new_tokens=8, eos_token_id=everything).shape == (3, 6)


def test_it_goes_on_to_the_last_token_that_fits(speaker):
    artifact = speaker[1]
    prompt = PADDED[1:2, :3]
    assert artifact.generate(prompt, max_new_tokens=15, eos_token_id=()).shape == (1, 18)  # a past of 16


# --- drawing ---


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 5, None), (1.0, None, 0.8), (2.0, 100, 0.5)])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(4, 50) * 3
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        theirs.append(TopPLogitsWarper(top_p))
    wanted = theirs(torch.zeros(4, 1, dtype=torch.int64), logits.clone())
    found = Sampling(temperature, top_k, top_p).kept(logits)
    torch.testing.assert_close(found, wanted)
    assert wanted.isinf().any()
    tiny = Sampling(top_p=1e-9).kept(logits)
    assert (~tiny.isinf()).sum(-1).tolist() == [1] * 4


def test_a_seed_draws_the_same_again(speaker):
    artifact = speaker[1]
    drawn = [
        artifact.generate(PADDED, max_new_tokens=8, eos_token_id=(), do_sample=True, temperature=5.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    likeliest = artifact.generate(PADDED, max_new_tokens=8, eos_token_id=())
    one = artifact.generate(PADDED, max_new_tokens=8, eos_token_id=(), do_sample=True, top_k=1)
    assert torch.equal(one, likeliest)


# --- adapters that are chosen at the call ---


class Chosen(nn.Module):
    """`Speaker`, whose logits each row's adapter moves."""

    def __init__(self) -> None:
        super().__init__()
        self.speaker = artifacts.Speaker()
        self.bank = nn.Parameter(torch.randn(2, VOCABULARY) * 50)

    def forward(
        self,
        adapter_ids: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_0_key: Tensor,
        past_0_value: Tensor,
    ) -> dict[str, Tensor]:
        said = self.speaker(input_ids, attention_mask, position_ids, past_0_key, past_0_value)
        return {**said, "logits": said["logits"] + self.bank[adapter_ids][:, None]}


def test_rows_have_adapters_of_their_own(tmp_path):
    torch.manual_seed(0)
    inputs = {"adapter_ids": torch.tensor([0, 1, 1]), **artifacts.speaker_inputs(3, 5, 7)}
    free: dict[str, Any] = {
        name: {0: Dim.AUTO, **({} if each.dim() == 1 else {(2 if each.dim() == 4 else 1): Dim.AUTO})}
        for name, each in inputs.items()
    }
    program = artifacts.exported(Chosen(), inputs, free)
    entry = {**SPEAKING, "inputs": [tensor("adapter_ids", "batch", dtype="int64"), *SPEAKING["inputs"]]}
    directory = artifacts.write_speaker(
        tmp_path,
        program,
        adapters="routed",
        adapter_names=["calm", "loud"],
        entries={"prefill": entry, "decode": entry},
    )
    artifact = Artifact.load(directory)

    def say(rows: Tensor, **chosen: Any) -> Tensor:
        return artifact.generate(rows, max_new_tokens=6, eos_token_id=(), **chosen)

    mixed = say(PADDED, adapter=["calm", "loud", "calm"])
    assert torch.equal(mixed, say(PADDED, adapter_ids=torch.tensor([0, 1, 0])))
    calm, loud = say(PADDED, adapter="calm"), say(PADDED, adapter="loud")
    assert torch.equal(mixed[[0, 2]], calm[[0, 2]])
    assert torch.equal(mixed[1], loud[1])
    assert not torch.equal(calm[1], loud[1])


# --- an encoder and a decoder ---


class Encoder(nn.Module):
    """What both programs of an encoder-decoder share: a decoder that also sees what it is told about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.own, self.cross = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for each in self.parameters():
            nn.init.normal_(each)

    def decode(self, text: Tensor, mask: Tensor, past: tuple[Tensor, Tensor], cross: tuple[Tensor, Tensor]) -> Any:
        hidden = self.embed(text)
        query, key, value = (
            each.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for each in self.own(hidden).chunk(3, -1)
        )
        keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        own = (query @ keys.transpose(2, 3)).softmax(-1) @ values
        scores = (query @ cross[0].transpose(2, 3)).masked_fill(mask[:, None, None] == 0, -1e9)
        mixed = own + scores.softmax(-1) @ cross[1]
        return self.head(hidden + mixed.transpose(1, 2).flatten(2))[:, -1:], keys, values


class Prefill(nn.Module):
    def __init__(self, shared: Encoder):
        super().__init__()
        self.shared = shared

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        told = self.shared.cross(self.shared.embed(input_ids))
        _, key, value = (each.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for each in told.chunk(3, -1))
        empty = key[:, :, :0]
        logits, keys, values = self.shared.decode(decoder_input_ids, attention_mask, (empty, empty), (key, value))
        return {
            "logits": logits,
            "present_0_key": keys,
            "present_0_value": values,
            "present_cross_0_key": key,
            "present_cross_0_value": value,
        }


class Decode(nn.Module):
    def __init__(self, shared: Encoder):
        super().__init__()
        self.shared = shared

    def forward(
        self,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        past_0_key: Tensor,
        past_0_value: Tensor,
        past_cross_0_key: Tensor,
        past_cross_0_value: Tensor,
    ) -> dict[str, Tensor]:
        past, cross = (past_0_key, past_0_value), (past_cross_0_key, past_cross_0_value)
        logits, keys, values = self.shared.decode(decoder_input_ids, attention_mask, past, cross)
        return {"logits": logits, "present_0_key": keys, "present_0_value": values}


def _write_translator(directory: Path, shared: Encoder) -> Path:
    prefill = {
        "input_ids": torch.ones(3, 5, dtype=torch.int64),
        "attention_mask": torch.ones(3, 5, dtype=torch.int64),
        "decoder_input_ids": torch.ones(3, 1, dtype=torch.int64),
    }
    cache = {name: torch.zeros(3, HEADS, 7, SIZE) for name in ("past_0_key", "past_0_value")}
    cross = {f"past_cross_0_{kind}": torch.zeros(3, HEADS, 5, SIZE) for kind in ("key", "value")}
    decode = {**{name: prefill[name] for name in ("attention_mask", "decoder_input_ids")}, **cache, **cross}
    programs = {}
    for name, module, inputs in (("prefill", Prefill(shared), prefill), ("decode", Decode(shared), decode)):
        free = {
            key: {0: Dim.AUTO, **({} if key == "decoder_input_ids" else {each.dim() // 2: Dim.AUTO})}
            for key, each in inputs.items()
        }
        programs[f"{name}.pt2"] = artifacts.exported(module, inputs, free)
    source, text = ("batch", "source"), ("batch", "sequence")
    told = [tensor(f"past_cross_0_{kind}", "batch", HEADS, "source", SIZE) for kind in ("key", "value")]
    past = [tensor(f"past_0_{kind}", "batch", HEADS, "past", SIZE) for kind in ("key", "value")]
    grown = [tensor(f"present_0_{kind}", "batch", HEADS, "past + sequence", SIZE) for kind in ("key", "value")]
    mask = tensor("attention_mask", *source, dtype="int64")
    logits, words = tensor("logits", "batch", 1, VOCABULARY), tensor("decoder_input_ids", *text, dtype="int64")
    own = {f"present_0_{kind}": f"past_0_{kind}" for kind in ("key", "value")}
    both = {**own, **{f"present_cross_0_{kind}": f"past_cross_0_{kind}" for kind in ("key", "value")}}
    after = [{**each, "name": each["name"].replace("past", "present")} for each in told]
    entries = {
        "prefill": {
            "file": "prefill.pt2",
            "inputs": [tensor("input_ids", *source, dtype="int64"), mask, words],
            "outputs": [logits, *grown, *after],
            "state": both,
        },
        "decode": {
            "file": "decode.pt2",
            "inputs": [mask, words, *past, *told],
            "outputs": [logits, *grown],
            "state": own,
        },
    }
    return artifacts.write(
        directory,
        programs,
        entries=entries,
        dimensions={**artifacts.DIMENSIONS, "source": {"min": 1, "max": 16}},
        generation={**GENERATION, "decoder_start_token_id": 1, "encoder_decoder": True},
    )


def test_an_encoder_is_called_once(tmp_path):
    torch.manual_seed(0)
    shared = Encoder()
    artifact = Artifact.load(_write_translator(tmp_path, shared))
    source = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    mask = (source != 0).long()
    text = torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad():
        told = shared.cross(shared.embed(source))
        _, key, value = (each.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for each in told.chunk(3, -1))
        empty = key[:, :, :0]
        past = (empty, empty)
        for _ in range(8):
            logits, *past = shared.decode(text[:, -1:], mask, past, (key, value))
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(artifact.generate(source, mask, max_new_tokens=8, eos_token_id=()), text)
    assert torch.equal(artifact.generate(source, max_new_tokens=8, eos_token_id=()), text)  # a mask of what is padding
    assert not torch.equal(text[0], text[1])
