"""What a user can get wrong with a model or a checkpoint: each case has its message, and changes nothing."""

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionLayer, StaticCache

from peftc import compiler
from peftc.compiler.load_model.models import find_model
from peftc.passes.quantized.schemes import known
from tests.golden_files import Golden
from tests.passes.quantized.storages import STORES

SPEC = "adapter a = lora(rank = 2) { on q_proj, v_proj }"
NET = "adapter a = lora(rank = 2) { on linear }"
Case = Callable[["Ground"], object]


class Ground:
    """A model, an adapted model, and a good checkpoint to spoil."""

    def __init__(self, directory: Path, pristine: Path, model: nn.Module):
        self.directory, self.model = directory, model
        self.checkpoint = directory / "checkpoint"
        shutil.copytree(pristine, self.checkpoint)

    def apply(self, clauses: str, head: str = "lora(rank = 2)", after: str = "", **options: object) -> object:
        return compiler.apply(self.model, f"adapter a = {head} {{ {clauses} }}\n{after}", **options)  # type: ignore[arg-type]

    def load(self, **options: object) -> object:
        return compiler.load(self.model, self.checkpoint, **options)

    def config(self, **fields: object) -> "Ground":
        path = self.checkpoint / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return self

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> "Ground":
        path = self.checkpoint / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return self

    def write(self, name: str, content: bytes | str) -> "Ground":
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self

    def tokens(self, ids: list[int], rows: int | None = None) -> "Ground":
        key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        value = torch.zeros(len(ids) if rows is None else rows, 32)
        return self.config(trainable_token_indices=ids).tensors(lambda each: each.update({key: value}))

    def front(self, head: str, tensor: torch.Tensor | None) -> "Ground":
        """A checkpoint of what stands in front, with another tensor than it should have."""
        compiler.apply(self.model, f"adapter a = {head}").save_pretrained(self.checkpoint)
        given = {"other": torch.zeros(1)} if tensor is None else {"prompt_embeddings": tensor}
        return self.tensors(lambda tensors: (tensors.clear(), tensors.update(given)))

    def fronts(self, first: str, second: str) -> object:
        adapted = compiler.apply(self.model, f"adapter a = {first}\nadapter b = {second}")
        return adapted.set_adapter(["a", "b"])

    def export(self, spec: str = SPEC, **options: object) -> object:
        return self.exported(self.model, spec, **options)

    def exported(self, model: nn.Module, spec: str, **options: object) -> object:
        """An export, which is to leave nothing behind when it fails."""
        adapted = compiler.apply(model, spec)
        _randomised(adapted)
        before = sorted(self.directory.rglob("*"))
        try:
            return adapted.export(self.directory / "above" / "out", **options)  # type: ignore[arg-type]
        finally:
            assert sorted(self.directory.rglob("*")) == before

    def remove(self, name: str) -> "Ground":
        (self.checkpoint / name).unlink()
        return self

    def adapted(self, **options: object) -> compiler.AdaptedModel:
        return compiler.apply(self.model, SPEC, **options)  # type: ignore[arg-type]


HEAD = "base_model.model.lm_head.weight"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _tokenizer() -> object:
    words = {**{f"w{index}": index for index in range(63)}, "<unk>": 63}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    made.add_tokens(["<tool>"])
    return made


def _started(adapted: object, tokens: int, rows: int = 1) -> object:
    layers = adapted.config.num_hidden_layers  # type: ignore[attr-defined]
    pairs = [(torch.ones(rows, 2, tokens, 8), torch.ones(rows, 2, tokens, 8))] * layers
    return adapted.initialize_kv_prefix_from_past_key_values(past_key_values=pairs)  # type: ignore[attr-defined]


def _texted(adapted: object, tokenizer: object) -> object:
    return adapted.initialize_kv_prefix_from_text(tokenizer, text="w1")  # type: ignore[attr-defined]


def _both(ground: Ground, first: str, second: str) -> compiler.AdaptedModel:
    adapted = compiler.apply(ground.model, f"adapter a = lora(rank = 2) {{ {first} }}")
    adapted.add_adapter(f"adapter b = lora(rank = 2) {{ {second} }}")
    return adapted


def _pickled(ground: Ground) -> object:
    ground.remove("adapter_model.safetensors")
    torch.save({KEY: torch.zeros(2, 32)}, ground.checkpoint / "adapter_model.bin")
    return ground.load()


def _truncated(ground: Ground) -> object:
    path = ground.checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    return ground.load()


def _link_out(ground: Ground) -> object:
    (ground.checkpoint / "inner").symlink_to("/etc")
    return ground.load(subfolder="inner")


def _untraceable(ground: Ground) -> object:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else x

    return compiler.apply(Branches(), NET, example_inputs=(torch.ones(2, 4),))


def _misfit(ground: Ground) -> object:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    return compiler.load(transformers.GPT2LMHeadModel(config), ground.checkpoint)


def _measured_when_merged(ground: Ground) -> object:
    adapted = ground.adapted()
    adapted.merge_adapter()
    return adapted.merge_drift()


def _not_finite(ground: Ground) -> object:
    adapted = ground.adapted()
    with torch.no_grad():
        adapted.get_parameter("adapter_bank.a.model__layers__0__self_attn__q_proj.B").fill_(float("nan"))
    return adapted.merge_adapter(safe_merge=True)


def _tensor_like(ground: Ground) -> object:
    return ground.adapted(regions="model")(input_ids=[1, "two", object()])


def _randomised(adapted: nn.Module) -> None:
    for each in adapted.get_submodule("adapter_bank").parameters():
        nn.init.normal_(each)


def _exported_without(ground: Ground) -> object:
    adapted = ground.adapted()
    adapted.delete_adapter("a")
    return adapted.export(ground.directory / "out", format="pt2", adapters="routed")


def _exported_disabled(ground: Ground) -> object:
    adapted = ground.adapted()
    adapted.disable_adapters()
    return adapted.export(ground.directory / "out", format="pt2")


def _exported_after_merging(ground: Ground) -> object:
    adapted = ground.adapted()
    adapted.merge_adapter()
    return adapted.export(ground.directory / "out", format="pt2", adapters="inputs")


def _exported_rounded(ground: Ground, **limits: object) -> object:
    """Merging rounds away half of what the adapter does, and so another token is preferred."""
    adapted = compiler.apply(_Rounded(), "adapter a = lora(rank = 1, alpha = 1) { on linear }")
    bank = adapted.get_submodule("adapter_bank.a.linear")
    with torch.no_grad():
        bank.get_parameter("A").fill_(1.0)
        bank.get_parameter("B").copy_(torch.tensor([[1.0], [0.75]]))
    example = {"x": torch.ones(2, 2, dtype=torch.bfloat16)}
    return adapted.export(ground.directory / "out", format="pt2", example_inputs=example, **limits)  # type: ignore[arg-type]


def _exported_packed(ground: Ground, **options: object) -> object:
    return ground.exported(
        transformers.LlamaForCausalLM(_small()).eval(),
        f"base {{ quantize = nf4() }}\n{SPEC}",
        format="pt2",
        **options,
    )


@contextmanager
def _disk(left: int) -> Iterator[None]:
    """No file can grow beyond this size: what a full disk does, for one process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def _without_disk(ground: Ground, left: int, **options: object) -> object:
    with _disk(left):
        return ground.exported(_Net(), NET, format="pt2", example_inputs={"x": torch.ones(2, 4)}, **options)


def _checkpoint_without_disk(ground: Ground, left: int) -> object:
    with _disk(left):
        return ground.export()


def _images() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config)


def _tasks(ground: Ground, **tasks: object) -> object:
    adapted = compiler.apply(ground.model, "adapter a = multitask_prompt(length = 2, tasks = 3)")
    return adapted(torch.ones(2, 3, dtype=torch.long), **tasks)


CASES: dict[str, Case] = {
    # specs that do not fit a model
    "selector_typo": lambda g: g.apply("on layers[*].self_attn.{q_porj, v_proj}"),
    "selector_container": lambda g: g.apply("on self_attn"),
    "selector_not_direct": lambda g: g.apply("on layers[0].q_proj"),
    "selector_beyond": lambda g: g.apply("on layers[7].**.q_proj"),
    "selector_pattern": lambda g: g.apply('on "model.*bogus"'),
    "where_too_strict": lambda g: g.apply("on q_proj where in_features > 4096"),
    "skip_without_effect": lambda g: g.apply("on q_proj\n skip layers[7]"),
    "refine_without_effect": lambda g: g.apply("on q_proj\n refine v_proj with rank = 4"),
    "train_typo": lambda g: g.apply("on q_proj\n train lm_heed"),
    "train_nothing": lambda g: g.apply("train rotary_emb"),
    "train_tied_to_nothing": lambda g: g.apply("on q_proj\n train lm_head tied"),
    "train_tied_typo": lambda g: g.apply("on q_proj\n train lm_head tide"),
    "train_all_there_is_on": lambda g: g.apply("on q_proj, k_proj\n train self_attn"),
    "train_by_number": lambda g: g.apply("on q_proj\n train 3"),
    "bias_of_none": lambda g: g.apply("on q_proj\n bias adapter"),
    "bias_all_of_none": lambda g: g.apply("on q_proj\n bias all"),
    "bias_beside_a_prompt": lambda g: g.apply("bias adapter", "prompt(length = 2)"),
    "bias_typo": lambda g: g.apply("on q_proj\n bias every"),
    "norms_where": lambda g: g.apply("on norm where in_features > 4", "ln_tuning"),
    "norms_of_a_block": lambda g: g.apply("on layers[0]", "ln_tuning"),
    "rank_over_size": lambda g: g.apply("on q_proj", "lora(rank = 33)"),
    "rank_of_a_billion": lambda g: g.apply("on q_proj", "lora(rank = 1000000000)"),
    "dropout_on_a_parameter": lambda g: compiler.apply(
        _Stack(), "adapter a = lora(rank = 2, dropout = 0.5) { on experts }"
    ),
    "tokens": lambda g: g.apply('on q_proj\n tokens ["<tool>"]'),
    "tokens_unknown": lambda g: g.apply('tokens ["<tol>", "w5"]', tokenizer=_tokenizer()),
    "tokens_outside": lambda g: g.apply("tokens [5, 64]"),
    "tokens_of_no_tokenizer": lambda g: g.apply('tokens ["<tool>"]', tokenizer="gpt2"),
    "tokens_in_a_block": lambda g: g.apply("tokens [5] in layers"),
    "tokens_in_a_typo": lambda g: g.apply("tokens [5] in lm_hed"),
    "tokens_twice": lambda g: g.apply("tokens [5, 6]\n tokens [6] in embed_tokens"),
    "tokens_and_train": lambda g: g.apply("tokens [5]\n train embed_tokens"),
    "tokens_and_delta": lambda g: g.apply("on lm_head\n tokens [5] in lm_head"),
    "tokens_alone_on_sites": lambda g: g.apply("on q_proj\n tokens [5]", "trainable_tokens"),
    "tokens_alone_without": lambda g: g.apply("", "trainable_tokens"),
    "quantized_by_another": lambda g: compiler.apply(_foreign(), "adapter a = lora { on k_proj }"),
    "quantized_trained": lambda g: compiler.apply(_packed(), "adapter a = lora { on q_proj train head }"),
    "quantized_block_trained": lambda g: compiler.apply(_packed(), "adapter a = ln_tuning { on q_proj, norm }"),
    "quantized_tokens": lambda g: compiler.apply(_packed(), "adapter a = lora { on q_proj tokens [1] in head }"),
    "quantized_scheme_taken": lambda g: known.register(known.SCHEMES[0]),
    "no_default": lambda g: compiler.apply(nn.Sequential(nn.Linear(4, 4)), "adapter a = lora"),
    "base_architecture": lambda g: g.apply("on q_proj", after='base { architecture = "GPT2LMHeadModel" }'),
    "base_field": lambda g: g.apply("on q_proj", after="base { hidden_size = 65 }"),
    "base_unknown_field": lambda g: g.apply("on q_proj", after="base { hiden_size = 32 }"),
    "quantize_unknown_scheme": lambda g: _quantized(g.model, "nf5(double_quant = true)"),
    "quantize_no_scheme": lambda g: _quantized(g.model, "4"),
    "quantize_unknown_option": lambda g: _quantized(g.model, "nf4(dobule_quant = true)"),
    "quantize_option_of_another": lambda g: _quantized(g.model, "nf4(threshold = 6)"),
    "quantize_option_without_a_name": lambda g: _quantized(g.model, "nf4(true)"),
    "quantize_option_twice": lambda g: _quantized(g.model, "fp4(compute = float32, compute = float32)"),
    "quantize_no_flag": lambda g: _quantized(g.model, "fp4(double_quant = 1)"),
    "quantize_no_type": lambda g: _quantized(g.model, "nf4(compute = bflaot16)"),
    "quantize_type_in_quotes": lambda g: _quantized(g.model, 'nf4(compute = "bfloat16")'),
    "quantize_threshold_below_zero": lambda g: _quantized(g.model, "int8(threshold = -1)"),
    "quantize_threshold_a_text": lambda g: _quantized(g.model, 'int8(threshold = "6")'),
    "quantize_skip_a_text": lambda g: _quantized(g.model, 'nf4(skip = "lm_head")'),
    "quantize_skip_no_name": lambda g: _quantized(g.model, 'nf4(skip = ["lm_head", "layers[*]"])'),
    "quantize_skip_twice": lambda g: _quantized(g.model, 'nf4(skip = ["lm_head", "lm_head"])'),
    "quantize_skip_missing": lambda g: _quantized(g.model, 'nf4(skip = ["lm_heda"])'),
    "quantize_otherwise": lambda g: _quantized(_packed(), "nf4(double_quant = true)"),
    "quantize_into_another_scheme": lambda g: _quantized(_packed(), "int8(threshold = 5.5)"),
    "quantize_skip_packed": lambda g: _quantized(_packed(), 'nf4(skip = ["head"])'),
    "quantize_nothing": lambda g: _quantized(nn.Sequential(nn.LayerNorm(4)), "nf4()"),
    "quantize_of_doubles": lambda g: _quantized(nn.Sequential(nn.Linear(4, 4)).double(), "nf4()"),
    "spec_of_a_megabyte": lambda g: compiler.apply(g.model, "adapter a = lora { on q_proj }\n" + "#" * 2**21),
    "spec_missing": lambda g: compiler.apply(g.model, g.directory / "absent.adapter"),
    "use_escapes": lambda g: compiler.apply(
        g.model, g.write("s.adapter", 'use "../other.adapter"\nadapter a = lora').directory / "s.adapter"
    ),
    # models
    "not_a_model": lambda g: compiler.apply("llama", SPEC),
    "untraceable": _untraceable,
    "adapted_twice": lambda g: compiler.apply(g.adapted(), SPEC),
    "model_missing": lambda g: find_model(str(g.directory / "absent")),
    "model_config_not_json": lambda g: find_model(str(g.write("m/config.json", "{").directory / "m")),
    "model_config_without_type": lambda g: find_model(str(g.write("m/config.json", "{}").directory / "m")),
    "model_config_unknown_type": lambda g: find_model(
        str(g.write("m/config.json", '{"model_type": "lama"}').directory / "m")
    ),
    "model_quantized_by_hqq": lambda g: _checkpoint(g, quant_method="hqq"),
    "model_quantized_by_a_typo": lambda g: _checkpoint(g, quant_method="gtpq"),
    "model_quantized_by_nobody": lambda g: _checkpoint(g, bits=4),
    "model_factory_missing": lambda g: find_model("json:no_such_factory"),
    "model_factory_module_missing": lambda g: find_model("no_such_module_at_all:make"),
    # checkpoints
    "checkpoint_missing": lambda g: compiler.load(g.model, g.directory / "chekpoint"),
    "checkpoint_no_config": lambda g: g.remove("adapter_config.json").load(),
    "checkpoint_no_weights": lambda g: g.remove("adapter_model.safetensors").load(),
    "checkpoint_pickle": _pickled,
    "checkpoint_truncated": _truncated,
    "checkpoint_config_not_json": lambda g: g.write("checkpoint/adapter_config.json", "{'r': 2}").load(),
    "checkpoint_config_a_list": lambda g: g.write("checkpoint/adapter_config.json", "[]").load(),
    "checkpoint_unknown_field": lambda g: g.config(lora_alhpa=4).load(strict=True),
    "checkpoint_wrong_type": lambda g: g.config(r="eight").load(),
    "checkpoint_unknown_method": lambda g: g.config(peft_type="LORRA").load(),
    "checkpoint_unsupported_field": lambda g: g.config(use_qalora=True).load(),
    "checkpoint_changed_base": lambda g: g.config(init_lora_weights="corda").load(),
    "checkpoint_missing_key": lambda g: g.tensors(lambda t: t.pop(KEY)).load(),
    "checkpoint_extra_key": lambda g: g.tensors(lambda t: t.update({KEY + "s": torch.zeros(1)})).load(),
    "checkpoint_other_rank": lambda g: g.tensors(lambda t: t.update({KEY: torch.zeros(3, 32)})).load(),
    "checkpoint_rank_of_a_billion": lambda g: g.config(r=10**9).load(),
    "checkpoint_other_base": _misfit,
    "checkpoint_escapes": lambda g: g.load(subfolder="../checkpoint"),
    "checkpoint_link_escapes": _link_out,
    "checkpoint_newer_manifest": lambda g: g.write("checkpoint/peftc_manifest.json", '{"format": 99}').load(),
    "checkpoint_tokens_beyond": lambda g: g.tokens([5, 70]).load(),
    "checkpoint_tokens_without_head": lambda g: g.tokens([5, 64]).load(),
    "checkpoint_tokens_fewer_rows": lambda g: g.tokens([5, 6], 3).load(),
    "checkpoint_tokens_no_list": lambda g: g.tokens([5]).config(trainable_token_indices={"embed_tokens": "5"}).load(),
    "checkpoint_tokens_negative": lambda g: g.tokens([-1]).load(),
    # what stands in front: where it fits
    "front_on": lambda g: g.apply("on q_proj", "prompt(length = 2)"),
    "front_skip": lambda g: g.apply("skip layers[0]", "prefix(length = 2)"),
    "front_of_images": lambda g: compiler.apply(_images(), "adapter a = prompt(length = 2)"),
    "front_of_a_plain_module": lambda g: compiler.apply(nn.Linear(4, 4), "adapter a = prefix(length = 2)"),
    "front_without_attention": lambda g: compiler.apply(nn.Linear(4, 4), "adapter a = adaption_prompt(length = 2)"),
    "front_no_attention_chosen": lambda g: g.apply("on mlp", "adaption_prompt(length = 2)"),
    "front_attention_where": lambda g: g.apply("on self_attn where in_features > 4", "adaption_prompt(length = 2)"),
    "front_attention_skipped": lambda g: g.apply("on self_attn\n skip layers[0]", "adaption_prompt(length = 2)"),
    "front_length_zero": lambda g: g.apply("", "prompt(length = 0)"),
    "front_length_of_a_billion": lambda g: g.apply("", "prefix(length = 1000000000)"),
    "front_no_tasks": lambda g: g.apply("", "multitask_prompt(length = 2, tasks = 0)"),
    "front_frozen_beyond": lambda g: g.apply("", "cartridge(length = 2, frozen = 3)"),
    "front_text_without_tokenizer": lambda g: g.apply("", 'prompt(length = 2, init = "text", text = "Be kind.")'),
    "front_without_text": lambda g: g.apply("", 'prompt(length = 2, init = "text", tokenizer = "gpt2")'),
    # checkpoints of what stands in front
    "checkpoint_other_length": lambda g: g.front("prompt(length = 2)", torch.zeros(3, 32)).load(),
    "checkpoint_other_layers": lambda g: g.front("prefix(length = 2)", torch.zeros(2, 4 * 64)).load(),
    "checkpoint_prompt_missing": lambda g: g.front("prompt(length = 2)", None).load(),
    "checkpoint_head_missing": lambda g: g.config(modules_to_save=["lm_head"]).load(),
    "checkpoint_head_of_another_size": lambda g: (
        g.config(modules_to_save=["lm_head"]).tensors(lambda t: t.update({HEAD: torch.zeros(65, 32)})).load()
    ),
    "checkpoint_train_no_list": lambda g: g.config(modules_to_save="lm_head").load(),
    "checkpoint_bias_unknown": lambda g: g.config(bias="every").load(),
    # calls
    "tasks_missing": lambda g: _tasks(g),
    "tasks_no_whole_numbers": lambda g: _tasks(g, task_ids=torch.tensor([0.0, 1.0])),
    "tasks_no_numbers": lambda g: _tasks(g, task_ids=["summary", "title"]),
    "tasks_beyond": lambda g: _tasks(g, task_ids=torch.tensor([0, 3])),
    "tasks_too_many": lambda g: _tasks(g, task_ids=torch.tensor([0, 1, 2])),
    "tasks_of_none": lambda g: g.adapted()(torch.ones(2, 3, dtype=torch.long), task_ids=torch.tensor([0, 1])),
    "front_of_cache_and_text": lambda g: g.fronts("prefix(length = 2)", "prompt(length = 2)"),
    "front_counted_in_two_ways": lambda g: g.fronts("prompt(length = 2)", "prompt(length = 2, peft_compatible = true)"),
    "front_weighted": lambda g: g.apply("", "prompt(length = 2)", after="activate 0.5 * a"),
    "front_weighted_below_zero": lambda g: g.apply("", "prefix(length = 2)").set_adapter({"a": -0.5}),
    "start_of_no_prefix": lambda g: _started(g.adapted(), 2),
    "start_of_a_projection": lambda g: _started(g.apply("", "prefix(length = 2, projection = true)"), 2),
    "start_too_short": lambda g: _started(g.apply("", "cartridge(length = 3)"), 2),
    "start_of_many_texts": lambda g: _started(g.apply("", "prefix(length = 2)"), 2, rows=3),
    "start_without_a_tokenizer": lambda g: _texted(g.apply("", "prefix(length = 2)"), None),
    "start_of_a_short_text": lambda g: _texted(g.apply("", "prefix(length = 2)"), _tokenizer()),
    "front_merged": lambda g: g.apply("", "prompt(length = 2)").merge_and_unload(),
    "tokens_overlap": lambda g: _both(g, "tokens [5, 6, 7]", "tokens [6, 7]").set_adapter(["a", "b"]),
    "tokens_and_copy": lambda g: _both(g, "train embed_tokens", "tokens [6, 7]").set_adapter(["a", "b"]),
    "tokens_weighted": lambda g: _both(g, "tokens [5]", "tokens [6]").set_adapter({"a": 0.5, "b": 1.0}),
    "copies_overlap": lambda g: _both(g, "train lm_head, norm", "train norm").set_adapter(["a", "b"]),
    "copies_weighted": lambda g: _both(g, "train norm", "train norm").set_adapter({"a": 0.5}),
    "adapter_called_like_a_method": lambda g: g.adapted().add_adapter("adapter forward = lora(rank = 2)"),
    "adapter_unknown": lambda g: g.adapted().set_adapter("b"),
    "adapter_twice": lambda g: g.adapted().set_adapter(["a", "a"]),
    "adapter_taken": lambda g: g.adapted().add_adapter(SPEC),
    "adapter_not_a_spec": lambda g: g.adapted().add_adapter(42),
    "adapter_deleted_unknown": lambda g: g.adapted().delete_adapter("z"),
    "merge_measured_when_merged": _measured_when_merged,
    "merge_not_finite": _not_finite,
    "save_misspelt": lambda g: g.adapted().save_pretrained(g.directory / "out", selected_adapter=["a"]),
    "save_onto_a_file": lambda g: g.adapted().save_pretrained(g.checkpoint / "adapter_config.json"),
    # exports
    "export_unknown_format": lambda g: g.export(format="pt"),
    "export_unknown_place": lambda g: g.export(format="pt2", adapters="input"),
    "export_unknown_entry": lambda g: g.export(format="pt2", entry="decode"),
    "export_entry_of_a_checkpoint": lambda g: g.export(entry="forward"),
    "export_routed_checkpoint": lambda g: g.export(adapters="routed"),
    "export_shards_of_a_program": lambda g: g.export(format="pt2", max_shard_size="1GB"),
    "export_safe_merge_of_inputs": lambda g: g.export(format="pt2", adapters="inputs", safe_merge=True),
    "export_weights_of_routed": lambda g: g.export(format="pt2", adapters="routed", adapter_names={"a": 0.5}),
    "export_merged_that_cannot_be_weighted": lambda g: g.export(
        "adapter a = oft(block = 2) { on q_proj }", adapter_names={"a": 0.5}
    ),
    "export_merged_twice": lambda g: g.export(adapter_names=["a", "a"]),
    "export_adapter_unknown": lambda g: g.export(format="pt2", adapters="routed", adapter_names=["a", "aa"]),
    "export_adapter_twice": lambda g: g.export(format="pt2", adapters="routed", adapter_names=["a", "a"]),
    "export_adapters_unlike": lambda g: g.export(
        "adapter a = lora(rank = 2) { on q_proj }\nadapter b = lora(rank = 4) { on q_proj }",
        format="pt2",
        adapters="inputs",
    ),
    "export_of_no_adapter": _exported_without,
    "export_of_disabled_adapters": _exported_disabled,
    "export_inputs_of_merged": _exported_after_merging,
    "export_no_rows": lambda g: g.export(format="pt2", max_batch_size=0),
    "export_length_below_zero": lambda g: g.export(format="pt2", max_length=-1),
    "export_length_no_number": lambda g: g.export(format="pt2", max_length="64"),
    "export_length_beyond_positions": lambda g: g.exported(
        _gpt2(), "adapter a = lora(rank = 2)", format="pt2", max_length=65
    ),
    "export_drift_below_zero": lambda g: g.export(format="pt2", max_drift=-1.0),
    "export_drift_not_a_number": lambda g: g.export(format="pt2", max_drift=float("nan")),
    "export_agreement_in_percent": lambda g: g.export(format="pt2", min_agreement=99),
    "export_agreement_of_no_logits": lambda g: g.exported(
        _Net(),
        NET,
        format="pt2",
        min_agreement=1.0,
        example_inputs={"x": torch.ones(2, 4)},
    ),
    "export_too_much_drift": lambda g: _exported_rounded(g, max_drift=0.25),
    "export_too_little_agreement": lambda g: _exported_rounded(g, min_agreement=0.99),
    "export_generation_of_bert": lambda g: g.exported(
        _bert(), "adapter a = lora(rank = 2)", format="pt2", entry="generate"
    ),
    "export_of_a_plain_module": lambda g: g.exported(_Net(), NET, format="pt2"),
    "export_plain_module_as_a_checkpoint": lambda g: g.exported(_Net(), NET),
    "export_quantized_inputs": lambda g: _exported_packed(g, adapters="inputs"),
    "export_quantized_requantized": lambda g: _exported_packed(g, quantized="requantize"),
    "export_onto_a_file": lambda g: g.adapted().export(g.checkpoint / "adapter_config.json", format="pt2"),
    "export_below_a_file": lambda g: g.adapted().export(g.checkpoint / "adapter_config.json" / "out", format="pt2"),
    "export_where_nothing_can_be": lambda g: g.adapted().export("/proc/out", format="pt2"),
    "export_onto_a_checkpoint": lambda g: g.adapted().export(g.checkpoint, format="pt2"),
    "export_onto_everything": lambda g: g.adapted().export("/", format="pt2", force=True),
    "export_no_disk_left": lambda g: _without_disk(g, 1_000),
    "export_no_disk_left_for_a_checkpoint": lambda g: _checkpoint_without_disk(g, 3_000),
    "call_without_tensors": _tensor_like,
    "call_linear_attention_cache": lambda g: g.adapted(regions="model")(
        torch.ones(1, 3, dtype=torch.long), past_key_values=Cache(layers=[LinearAttentionLayer()])
    ),
    "call_full_static_cache": lambda g: g.adapted(regions="model")(
        torch.ones(1, 3, dtype=torch.long), past_key_values=StaticCache(g.model.config, max_cache_len=2)
    ),
}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class _Rounded(nn.Module):
    """In bfloat16 the numbers next to 256 are 255 and 258."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[256.0, -256.0], [0.0, 0.0]]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.linear(x)}


def _small() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForMaskedLM(config).eval()


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.experts


def _packed() -> nn.Module:
    store = STORES["nf4"]
    names = {"q_proj": store(nn.Linear(64, 64)), "norm": nn.LayerNorm(64), "head": store(nn.Linear(64, 64))}
    return nn.ModuleDict(names)


def _quantized(model: nn.Module, scheme: str) -> object:
    return compiler.apply(model, f'base {{ quantize = {scheme} }}\nadapter a = lora {{ on q_proj, "0" }}')


def _checkpoint(ground: Ground, **quantization: object) -> object:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    ground.write("m/model.safetensors", b"")
    return find_model(str(ground.write("m/config.json", json.dumps(config)).directory / "m"))


def _foreign() -> nn.Module:
    made = type("TorchQuantLinear", (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear.torch"})()
    made.register_buffer("qweight", torch.zeros(4, 2, dtype=torch.int32))
    return nn.ModuleDict({"q_proj": made, "k_proj": nn.Linear(4, 4)})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pristine(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    compiler.apply(model, SPEC).save_pretrained(directory)
    return directory


@pytest.fixture
def ground(tmp_path: Path, pristine: Path, model: nn.Module) -> Ground:
    return Ground(tmp_path, pristine, model)


def test_the_ground_is_good(ground: Ground) -> None:
    assert ground.load().active_adapters() == ["default"]
    assert len(CASES) >= 40


# The files that hold what is said, by the first word of a case's name; the rest is in one.
KINDS = frozenset(
    {
        *("adapter", "checkpoint", "export", "front", "model", "quantize"),
        *("quantized", "start", "tasks", "tokens", "train"),
    }
)


def kind_of(name: str) -> str:
    word = name.partition("_")[0]
    return word if word in KINDS else "other"


def test_no_text_is_left_of_a_case_that_is_gone(golden: Golden) -> None:
    for kind in {*KINDS, "other"}:
        golden.holds(f"bad_inputs/{kind}.txt", [name for name in CASES if kind_of(name) == kind])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, ground: Ground, golden: Golden) -> None:
    before = {key: value.clone() for key, value in ground.model.state_dict().items()}
    with pytest.raises(compiler.AdapterError) as caught:
        CASES[name](ground)
    text = str(caught.value).replace(str(ground.directory), "DIR").replace(str(Path.cwd()), "CWD")
    golden(f"bad_inputs/{kind_of(name)}.txt", text + "\n", name)
    assert all(torch.equal(value, before[key]) for key, value in ground.model.state_dict().items())
