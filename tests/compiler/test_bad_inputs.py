"""What a user can get wrong with a model or a checkpoint: each case has its message, and changes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from peftc import compiler
from peftc.compiler.models import find_model

SPEC = "adapter a = lora(rank = 2) { on q_proj, v_proj }"
Case = Callable[["Ground"], object]


class Ground:
    """A model, an adapted model, and a good checkpoint to spoil."""

    def __init__(self, directory: Path, pristine: Path, model: nn.Module):
        self.directory, self.model = directory, model
        self.checkpoint = directory / "checkpoint"
        shutil.copytree(pristine, self.checkpoint)

    def apply(self, clauses: str, head: str = "lora(rank = 2)", after: str = "") -> object:
        return compiler.apply(self.model, f"adapter a = {head} {{ {clauses} }}\n{after}")

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

    def remove(self, name: str) -> "Ground":
        (self.checkpoint / name).unlink()
        return self

    def adapted(self) -> compiler.AdaptedModel:
        return compiler.apply(self.model, SPEC)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


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

    return compiler.apply(Branches(), "adapter a = lora(rank = 2) { on linear }", example_inputs=(torch.ones(2, 4),))


def _misfit(ground: Ground) -> object:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    return compiler.load(transformers.GPT2LMHeadModel(config), ground.checkpoint)


def _merged_twice(ground: Ground) -> object:
    adapted = ground.adapted()
    adapted.merge_adapter()
    return adapted.merge_adapter()


def _not_finite(ground: Ground) -> object:
    adapted = ground.adapted()
    with torch.no_grad():
        adapted.get_parameter("adapter_bank.a.model.layers.0.self_attn.q_proj.B").fill_(float("nan"))
    return adapted.merge_adapter(safe_merge=True)


def _tensor_like(ground: Ground) -> object:
    return ground.adapted()(input_ids=[1, "two", object()])


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
    "rank_over_size": lambda g: g.apply("on q_proj", "lora(rank = 33)"),
    "rank_of_a_billion": lambda g: g.apply("on q_proj", "lora(rank = 1000000000)"),
    "dropout_on_a_parameter": lambda g: compiler.apply(
        _Stack(), "adapter a = lora(rank = 2, dropout = 0.5) { on experts }"
    ),
    "tokens": lambda g: g.apply('on q_proj\n tokens ["<tool>"]'),
    "no_default": lambda g: compiler.apply(nn.Sequential(nn.Linear(4, 4)), "adapter a = lora"),
    "base_architecture": lambda g: g.apply("on q_proj", after='base { architecture = "GPT2LMHeadModel" }'),
    "base_field": lambda g: g.apply("on q_proj", after="base { hidden_size = 65 }"),
    "base_unknown_field": lambda g: g.apply("on q_proj", after="base { hiden_size = 32 }"),
    "base_quantize": lambda g: g.apply("on q_proj", after="base { quantize = nf4(double_quant = true) }"),
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
    "checkpoint_unknown_field": lambda g: g.config(lora_alhpa=4).load(),
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
    # calls
    "adapter_unknown": lambda g: g.adapted().set_adapter("b"),
    "adapter_twice": lambda g: g.adapted().set_adapter(["a", "a"]),
    "adapter_taken": lambda g: g.adapted().add_adapter(SPEC),
    "adapter_not_a_spec": lambda g: g.adapted().add_adapter(42),
    "adapter_deleted_unknown": lambda g: g.adapted().delete_adapter("z"),
    "merged_twice": _merged_twice,
    "merge_not_finite": _not_finite,
    "save_pickle": lambda g: g.adapted().save_pretrained(g.directory / "out", safe_serialization=False),
    "save_onto_a_file": lambda g: g.adapted().save_pretrained(g.checkpoint / "adapter_config.json"),
    "call_without_tensors": _tensor_like,
    "call_static_cache": lambda g: g.adapted().generate(
        torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, cache_implementation="static"
    ),
}


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.experts


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, ground: Ground, golden: Callable[[str, str], None]) -> None:
    before = {key: value.clone() for key, value in ground.model.state_dict().items()}
    with pytest.raises(compiler.AdapterError) as caught:
        CASES[name](ground)
    text = str(caught.value).replace(str(ground.directory), "DIR")
    golden(f"bad_inputs/{name}.txt", text + "\n")
    assert all(torch.equal(value, before[key]) for key, value in ground.model.state_dict().items())
