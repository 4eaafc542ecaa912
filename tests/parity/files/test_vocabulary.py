"""Embeddings beside an adapter in a file: the vocabulary had grown, and the file holds the rows of the new tokens."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError, UsageError
from tests.matrix import wide
from tests.quantized_models import dense, quantize

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
IDS = torch.tensor([[1, 5, 9, 65, 23, 69], [2, 66, 3, 4, 50, 11]])
WEIGHTS = "adapter_model.safetensors"
Q = ["q_proj"]

CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: LoraConfig(target_modules=Q, task_type="CAUSAL_LM"),
    "on the embedding": lambda: LoraConfig(target_modules=[*Q, "embed_tokens"]),
    "on the head": lambda: LoraConfig(target_modules=[*Q, "lm_head"]),
    "on both": lambda: LoraConfig(target_modules=[*Q, "lm_head", "embed_tokens"]),
    "dora on both": lambda: LoraConfig(target_modules=[*Q, "lm_head", "embed_tokens"], use_dora=True),
    "tokens": lambda: LoraConfig(target_modules=Q, trainable_token_indices=[3, 65]),
    "tokens of both": lambda: LoraConfig(
        target_modules=Q, trainable_token_indices={"embed_tokens": [3, 65], "lm_head": [65]}
    ),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[3, 65]),
    "trained as wholes": lambda: LoraConfig(target_modules=Q, modules_to_save=["lm_head", "embed_tokens"]),
    "one trained as a whole": lambda: LoraConfig(target_modules=Q, modules_to_save=["embed_tokens"]),
    "head trained as a whole": lambda: LoraConfig(target_modules=Q, modules_to_save=["lm_head"]),
    "one trained, tied": lambda: LoraConfig(
        target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "ia3 on the head": lambda: peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
CASES = [(name, tied) for name in CONFIGS for tied in (False, True)]
NAMED = {f"{name}, {'tied' if tied else 'untied'}": (name, tied) for name, tied in CASES}
OFTEN = [f"{name}, {tied}" for name in ("lora", "on both", "tokens") for tied in ("tied", "untied")]


def plain(tied: bool, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **sizes}, tie_word_embeddings=tied)).eval()


def resized(tied: bool, seed: int, size: int = 70) -> Any:
    model = plain(tied)
    torch.manual_seed(seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits[:, -IDS.shape[1] :]  # what stands in front aside


def stirred(model: Any, seed: int = 5) -> Any:
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=made).to(value) * 0.3)
    return model


def theirs(tied: bool, where: Path, seed: int = 9) -> Any:
    return peft.PeftModel.from_pretrained(resized(tied, seed), where)


def written(name: str, tied: bool, where: Path, save: Any = True, seed: int = 3) -> torch.Tensor:
    """A file of peft, and what peft makes of it. Its keys are those of embeddings too."""
    model = stirred(peft.get_peft_model(resized(tied, seed), CONFIGS[name]()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(where, save_embedding_layers=save)
    return logits(theirs(tied, where))


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", wide(NAMED, OFTEN))
def test_a_file_of_peft(case: str, tmp_path: Path) -> None:
    name, tied = NAMED[case]
    want = written(name, tied, tmp_path / "theirs")
    base = resized(tied, 9)
    before = copy.deepcopy(base.state_dict())
    assert name == "prompt" or (want - logits(base)).abs().max() > 1e-2
    adapted = compiler.load(base, tmp_path / "theirs")
    near(logits(adapted), want)
    with adapted.disable_adapter():
        assert_close(logits(adapted), logits(base))
    adapted.save_pretrained(tmp_path / "ours")
    near(logits(theirs(tied, tmp_path / "ours")), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(logits(compiler.load(resized(tied, 9), tmp_path / "ours")), want)
    if name != "prompt":
        near(logits(adapted.merge_and_unload()), want)
        adapted.merge_adapter()
        near(logits(adapted), want)
        adapted.unmerge_adapter()
        near(logits(adapted), want)
    adapted.delete_adapter("default")
    assert_close(logits(adapted), logits(base))
    assert all(torch.equal(each, before[key]) for key, each in base.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["lora", "on both", "tokens", "ia3"])
def test_a_base_that_was_not_resized_is(name: str, tied: bool, tmp_path: Path) -> None:
    want = written(name, tied, tmp_path)
    base = plain(tied)
    adapted = compiler.load(base, tmp_path)
    assert adapted.config.vocab_size == adapted.get_input_embeddings().num_embeddings == 70
    assert base.config.vocab_size == base.get_input_embeddings().num_embeddings == 64
    near(logits(adapted), want)
    near(logits(adapted.merge_and_unload()), want)
    adapted.save_pretrained(tmp_path / "again")
    near(logits(theirs(tied, tmp_path / "again")), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(logits(compiler.load(plain(tied), tmp_path / "again")), want)


@pytest.mark.parametrize("tied", [False, True])
def test_going_on_to_train(tied: bool, tmp_path: Path) -> None:
    written("lora", tied, tmp_path)
    adapted = compiler.load(resized(tied, 9), tmp_path, is_trainable=True)
    other = peft.PeftModel.from_pretrained(resized(tied, 9), tmp_path, is_trainable=True)
    assert adapted.get_nb_trainable_parameters()[0] == other.get_nb_trainable_parameters()[0]
    adapted.train()(IDS, labels=IDS).loss.backward()
    other.train()(IDS, labels=IDS).loss.backward()
    ours = torch.cat([each.grad.flatten() for each in adapted.parameters() if each.requires_grad])
    wanted = torch.cat([each.grad.flatten() for each in other.parameters() if each.requires_grad])
    assert_close(ours.sort().values, wanted.sort().values, atol=1e-5, rtol=1e-4)


def test_in_half_precision(tmp_path: Path) -> None:
    written("on the embedding", False, tmp_path)
    adapted = compiler.load(resized(False, 9).bfloat16(), tmp_path)
    other = peft.PeftModel.from_pretrained(resized(False, 9).bfloat16(), tmp_path)
    assert_close(logits(adapted), logits(other), atol=0.05, rtol=0.05)
    read = [each for name, each in adapted.named_buffers() if "embed_tokens" in name]
    assert [each.dtype for each in read] == [torch.bfloat16]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    """Heads with biases, tied embeddings of several modules."""
    small = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48)
    makers: dict[str, tuple[Callable[[], Any], str]] = {
        "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)), "c_attn"),
        "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**small)), "query"),
        "t5": (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
            ),
            "q",
        ),
    }
    make, target = makers[kind]

    def base(seed: int) -> Any:
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model.eval()

    def outputs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            more = {"decoder_input_ids": IDS} if kind == "t5" else {}
            return model.eval()(input_ids=IDS, **more).logits

    model = stirred(peft.get_peft_model(base(3), LoraConfig(target_modules=[target])))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    want = outputs(peft.PeftModel.from_pretrained(base(9), tmp_path))
    assert (want - outputs(model)).abs().max() < 1e-4
    adapted = compiler.load(base(9), tmp_path)
    near(outputs(adapted), want)
    near(outputs(adapted.merge_and_unload()), want)
    adapted.save_pretrained(tmp_path / "ours")
    near(outputs(peft.PeftModel.from_pretrained(base(11), tmp_path / "ours")), want)


@pytest.mark.parametrize("fresh", [False, True])
def test_beside_a_head_that_the_task_trains(fresh: bool, tmp_path: Path) -> None:
    def base(seed: int) -> Any:
        torch.manual_seed(0)
        sizes = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48)
        model = hf.BertForSequenceClassification(hf.BertConfig(**sizes))
        torch.manual_seed(seed)
        if seed:
            model.resize_token_embeddings(70, mean_resizing=False)
        return model.eval()

    model = stirred(peft.get_peft_model(base(3), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapted = compiler.load(base(0 if fresh else 9), tmp_path).eval()
    with torch.no_grad():
        near(adapted(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("trainable", [False, True])
def test_on_a_quantized_base(trainable: bool, tmp_path: Path) -> None:
    """What is not quantized is held in float32 for training, and so is what was read."""

    def base(seed: int) -> Any:
        model = quantize(dense("llama"), "nf4", torch.bfloat16)
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model.eval()

    stirred(peft.get_peft_model(base(3), CONFIGS["lora"]())).save_pretrained(tmp_path, save_embedding_layers=True)
    other = peft.PeftModel.from_pretrained(base(9), tmp_path)
    adapted = compiler.load(base(9), tmp_path, is_trainable=trainable)
    assert_close(logits(adapted).float(), logits(other).float(), atol=0.05, rtol=0.05)
    kinds = {each.dtype for name, each in adapted.named_buffers() if "embed_tokens" in name}
    assert kinds == {torch.float32 if trainable else torch.bfloat16}
    if trainable:
        adapted.train()(IDS, labels=IDS).loss.backward()
    adapted.save_pretrained(tmp_path / "again")
    assert_close(logits(compiler.load(base(11), tmp_path / "again")), logits(other), atol=0.05, rtol=0.05)


def test_what_is_not_in_memory(tmp_path: Path) -> None:
    """Nothing can be compared, and nothing is saved of it: unasked without a word, asked with one."""
    written("on both", False, tmp_path / "theirs")
    base = resized(False, 9)
    for module in (base.get_input_embeddings(), base.lm_head):
        module.weight = torch.nn.Parameter(torch.empty_like(module.weight, device="meta"))
    adapted = compiler.load(base, tmp_path / "theirs")
    assert {name for copy in adapted.adapter_plan("default").copies for name in copy.read} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    fresh = compiler.apply(base, "adapter a = lora(rank = 2) { on q_proj }")
    with pytest.raises(UsageError, match=r"E527.*model.embed_tokens.weight is not in memory"):
        fresh.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    fresh.save_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("regions", ["modules", "model"])
@pytest.mark.parametrize("tied", [False, True])
def test_wherever_graphs_begin(tied: bool, regions: Any, tmp_path: Path) -> None:
    want = written("on the embedding", tied, tmp_path)
    adapted = compiler.load(resized(tied, 9), tmp_path, regions=regions)
    near(logits(adapted), want)
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    got = adapted.eval().generate(IDS, **options)
    assert torch.equal(got, theirs(tied, tmp_path).eval().generate(input_ids=IDS, **options))


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_checkpoint(tied: bool, tmp_path: Path) -> None:
    want = written("on both", tied, tmp_path / "theirs")
    compiler.load(plain(tied), tmp_path / "theirs").export(tmp_path / "merged")
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    near(logits(model), want)
    assert model.config.vocab_size == 70


# --- several adapters ---


@pytest.mark.parametrize("tied", [False, True])
def test_each_adapter_has_its_own(tied: bool, tmp_path: Path) -> None:
    first = written("lora", tied, tmp_path / "a", seed=3)
    second = written("on the embedding", tied, tmp_path / "b", seed=4)
    base = resized(tied, 9)
    adapted = compiler.load(base, tmp_path / "a", adapter_name="a")
    adapted.load_adapter(tmp_path / "b", "b")
    adapted.add_adapter("adapter c = lora(rank = 2) { on v_proj }")
    for name, want in {"b": second, "c": logits(base), "a": first}.items():
        adapted.set_adapter(name)
        near(logits(adapted), want)
    adapted.set_adapter(["a", "c"])  # c is at its start
    near(logits(adapted), first)
    adapted.set_adapter({"a": 0.5})
    half = theirs(tied, tmp_path / "a")
    for module in half.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.5
    near(logits(adapted), logits(half))
    adapted.set_adapter("a")
    with pytest.raises(UsageError, match=r"E514.*each made for another"):
        adapted.set_adapter(["a", "b"])
    assert adapted.active_adapters() == ["a"]
    adapted.delete_adapter("a")
    adapted.set_adapter("b")
    near(logits(adapted), second)
    near(logits(copy.deepcopy(adapted)), second)


def test_the_same_embeddings_of_several_adapters(tmp_path: Path) -> None:
    """Two that were trained on one resized base are active together, as in peft."""
    written("lora", False, tmp_path / "a")
    written("ia3", False, tmp_path / "b")
    adapted = compiler.load(resized(False, 9), tmp_path / "a", adapter_name="a")
    adapted.load_adapter(tmp_path / "b", "b")
    adapted.set_adapter(["a", "b"])
    merged = adapted.merge_and_unload()
    near(logits(merged), logits(adapted))
    embedding = load_file(tmp_path / "a" / WEIGHTS)["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(merged.get_input_embeddings().weight, embedding)


def test_beside_trained_tokens_and_a_trained_head_of_another(tmp_path: Path) -> None:
    """What another adapter trains takes the place of what was read, as in peft, where that is the base."""
    written("lora", False, tmp_path)
    adapted = compiler.load(resized(False, 9), tmp_path, adapter_name="a")
    adapted.add_adapter("adapter b = trainable_tokens { tokens [5, 66] }")
    stirred(adapted)
    adapted.add_adapter("adapter c = lora(rank = 2) { on v_proj train lm_head }")
    stirred(adapted)
    for active in (["a", "b"], ["b", "a"], ["a", "c"], ["c", "b", "a"]):
        adapted.set_adapter(active)
        near(logits(adapted.merge_and_unload()), logits(adapted))
    adapted.set_adapter(["b", "a"])
    rows = next(each for name, each in adapted.named_parameters() if name.endswith(".rows"))
    want = theirs(False, tmp_path)
    with torch.no_grad():
        want.get_input_embeddings().weight[[5, 66]] = rows
    near(logits(adapted), logits(want))


# --- which base it is ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["lora", "on both"])
def test_another_base_is_found_out(name: str, tied: bool, tmp_path: Path) -> None:
    written(name, tied, tmp_path)
    for size in (64, 70):
        torch.manual_seed(7)
        other = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "vocab_size": size}, tie_word_embeddings=tied))
        code = "E343" if size == 70 or name == "lora" else "E34[23]"
        with pytest.raises(CheckpointError, match=code):
            compiler.load(other, tmp_path)


def test_a_base_that_was_trained_further_is_found_out(tmp_path: Path) -> None:
    """There the tokens that are used most have changed, and those that are hardly used have not."""
    written("lora", False, tmp_path)
    base = resized(False, 9)
    with torch.no_grad():
        base.get_input_embeddings().weight[torch.randperm(64)[:40]] += 0.01
    with pytest.raises(CheckpointError, match=r"E343.*own 'model.embed_tokens.weight', which differs"):
        compiler.load(base, tmp_path)


def test_zeros_say_nothing(tmp_path: Path) -> None:
    written("lora", False, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for key in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        tensors[key] = torch.cat([torch.zeros(1, 32), torch.randn(69, 32)])
    save_file(tensors, tmp_path / WEIGHTS)
    base = resized(False, 9)
    with torch.no_grad():
        base.get_input_embeddings().weight[0] = base.lm_head.weight[0] = 0
    with pytest.raises(CheckpointError, match="E343"):
        compiler.load(base, tmp_path)


def test_reserved_tokens_that_were_given_a_meaning_are_told(tmp_path: Path) -> None:
    def base(seed: int) -> Any:
        model = plain(True)
        torch.manual_seed(seed)
        with torch.no_grad():
            model.get_input_embeddings().weight[[5, 9]] = torch.randn(2, 32)
        return model

    ids = IDS % 64
    model = stirred(peft.get_peft_model(base(3), CONFIGS["lora"]()))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"the tokens 5, 9 of 'model.embed_tokens.weight' otherwise"):
        adapted = compiler.load(base(4), tmp_path)
    with torch.no_grad():
        near(adapted.eval()(ids).logits, model.eval()(ids).logits)
        adapted.save_pretrained(tmp_path / "again")  # unasked: they are the adapter's
        theirs = peft.PeftModel.from_pretrained(base(4), tmp_path / "again").eval()
        near(theirs(ids).logits, model(ids).logits)


def test_a_larger_base_is_refused(tmp_path: Path) -> None:
    written("lora", False, tmp_path)
    with pytest.raises(CheckpointError, match=r"E343.*shape \[70, 32\], but the model's is \[128, 32\]"):
        compiler.load(resized(False, 9, 128), tmp_path)


def test_a_head_that_is_missing_is_said(tmp_path: Path) -> None:
    written("on the embedding", False, tmp_path)  # of which peft leaves the head out
    with pytest.raises(CheckpointError, match=r"E363.*no rows of lm_head.weight for so many"):
        compiler.load(plain(False), tmp_path)


def test_two_values_of_one_tensor_are_refused(tmp_path: Path) -> None:
    written("lora", True, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"][68:] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"E343.*which are one tensor in the model"):
        compiler.load(resized(True, 9), tmp_path)


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    written("lora", True, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop(next(key for key in tensors if "lora_A" in key))
    save_file(tensors, tmp_path / WEIGHTS)
    adapted = compiler.apply(plain(True), "adapter a = lora { on q_proj }")
    with pytest.raises(CheckpointError, match="E340"):
        adapted.load_adapter(tmp_path, "b")
    assert adapted.config.vocab_size == 64
    assert adapted._adapter_state.names() == ("a",)


# --- saving ---


def on_disk(tied: bool, where: Path) -> Any:
    plain(tied).save_pretrained(where)
    return hf.LlamaForCausalLM.from_pretrained(where)


def grown(tied: bool, where: Path, seed: int) -> Any:
    model = on_disk(tied, where)
    torch.manual_seed(seed)
    model.resize_token_embeddings(70, mean_resizing=False)
    return model.eval()


SPECS = {
    "lora": ("on q_proj", LoraConfig(target_modules=Q)),
    "on the embedding": ("on q_proj, embed_tokens", LoraConfig(target_modules=[*Q, "embed_tokens"])),
    "on both": ("on q_proj, embed_tokens, lm_head", LoraConfig(target_modules=[*Q, "embed_tokens", "lm_head"])),
    "tokens": ("on q_proj tokens [3, 5]", LoraConfig(target_modules=Q, trainable_token_indices=[3, 5])),
    "prompt": ("", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "tokens, on the head": (
        "on q_proj, lm_head tokens [3, 5] in embed_tokens",
        LoraConfig(target_modules=[*Q, "lm_head"], trainable_token_indices={"embed_tokens": [3, 5]}),
    ),
}


@pytest.mark.parametrize(
    ("case", "tied"), [(case, tied) for case in SPECS for tied in (False, True) if not (tied and "on the head" in case)]
)
def test_the_rule_is_pefts(case: str, tied: bool, tmp_path: Path) -> None:
    clauses, config = SPECS[case]
    spec = f"adapter default = lora(rank = 8) {{ {clauses} }}" if clauses else "adapter default = prompt(length = 3)"
    ours = compiler.apply(on_disk(tied, tmp_path / "base"), spec)
    other = peft.get_peft_model(on_disk(tied, tmp_path / "base"), copy.deepcopy(config))
    kept: dict[str, Any] = {"asked": {"save_embedding_layers": True}, "no": {"save_embedding_layers": False}, "": {}}
    for options in kept.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.save_pretrained(tmp_path / "ours", **options)
            other.save_pretrained(tmp_path / "theirs", **options)
        found, wanted = (set(load_file(tmp_path / each / WEIGHTS)) for each in ("ours", "theirs"))
        assert found - {key for key in found if "tokens_delta" in key} == wanted - {
            key for key in wanted if "tokens_delta" in key
        }, options


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", ["lora", "on the embedding", "tokens"])
def test_a_grown_vocabulary_is_saved_unasked(case: str, tied: bool, tmp_path: Path) -> None:
    base = grown(tied, tmp_path / "base", 3)
    adapted = stirred(compiler.apply(base, f"adapter default = lora(rank = 4) {{ {SPECS[case][0]} }}"))
    want = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(logits(compiler.load(grown(tied, tmp_path / "base", 9), tmp_path / "adapter")), want)
    other = peft.PeftModel.from_pretrained(grown(tied, tmp_path / "base", 9), tmp_path / "adapter")
    near(logits(other), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(logits(compiler.load(on_disk(tied, tmp_path / "base"), tmp_path / "adapter")), want)
    adapted.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert not {"lm_head.weight", "embed_tokens.weight"} & {
        ".".join(key.split(".")[-2:]) for key in load_file(tmp_path / "without" / WEIGHTS)
    }


def test_new_tokens_that_are_all_trained_need_no_embeddings(tmp_path: Path) -> None:
    base = grown(True, tmp_path / "base", 3)
    adapted = stirred(compiler.apply(base, "adapter a = lora(rank = 2) { on q_proj tokens [64, 65, 66, 67, 68, 69] }"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter" / WEIGHTS))
    near(logits(compiler.load(on_disk(True, tmp_path / "base"), tmp_path / "adapter")), logits(adapted))


def test_what_was_read_is_left_out_if_asked(tmp_path: Path) -> None:
    written("lora", False, tmp_path)
    adapted = compiler.load(resized(False, 9), tmp_path)
    adapted.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert all("lora_" in key for key in load_file(tmp_path / "without" / WEIGHTS))
    with pytest.warns(UserWarning, match="not those the adapter was trained on"):
        compiler.load(resized(False, 9), tmp_path / "without")


def test_a_merged_model_saves_the_bases_embeddings(tmp_path: Path) -> None:
    base = grown(False, tmp_path / "base", 3)
    adapted = stirred(compiler.apply(base, "adapter default = lora(rank = 4) { on q_proj, lm_head }"))
    want = logits(adapted)
    adapted.merge_adapter()
    adapted.save_pretrained(tmp_path / "adapter", state_dict=adapted.state_dict())
    near(logits(compiler.load(grown(False, tmp_path / "base", 9), tmp_path / "adapter")), want)


def test_a_config_that_is_gone_is_said(tmp_path: Path) -> None:
    adapted = compiler.apply(grown(False, tmp_path / "base", 3), "adapter a = lora { on q_proj }")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.warns(UserWarning, match="no config of .* to tell whether the vocabulary has grown"):
        adapted.save_pretrained(tmp_path / "adapter")


def test_only_three_answers(tmp_path: Path) -> None:
    adapted = compiler.apply(plain(False), "adapter a = lora { on q_proj }")
    with pytest.raises(UsageError, match=r"E526.*save_embedding_layers is 'yes'"):
        adapted.save_pretrained(tmp_path, save_embedding_layers="yes")
    assert not list(tmp_path.iterdir())


def test_a_model_without_embeddings_says_so(tmp_path: Path) -> None:
    adapted = compiler.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), "adapter a = lora(rank = 2) { on all linear }")
    with pytest.warns(UserWarning, match="does not say which of its modules embed tokens"):
        adapted.save_pretrained(tmp_path, save_embedding_layers=True)
