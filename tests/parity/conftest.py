"""Tiny models of many architectures, shared by every test: a trace costs seconds and serves a whole session."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from peftc.compiler.api import adapt
from peftc.runtime.model.model import AdaptedModel
from tests.peft_release import peft_as_oracle
from tests.shared_traces import shared_traces  # noqa: F401  (a fixture of every test here)


@pytest.fixture(scope="session", autouse=True)
def peft_computes_what_it_means() -> Iterator[None]:
    with peft_as_oracle():
        yield


VOCABULARY = 128
WINDOW = 6
DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def _t5() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0)
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None))


def _vit() -> nn.Module:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=8))


def _moe() -> nn.Module:
    experts = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**DECODER, **experts))


def _gemma3() -> nn.Module:
    sizes = {**DECODER, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": WINDOW, "layer_types": LAYER_TYPES}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes))


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **NO_DROPOUT)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
    "roberta": lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**ENCODER)),
    "t5": _t5,
    "vit": _vit,
    "moe": _moe,
    "gemma3": _gemma3,
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=WINDOW)),
}


class Zoo:
    """Makes models, batches and PEFT's side of a comparison. Models are made once and must not be changed."""

    window = WINDOW

    def __init__(self) -> None:
        self._models: dict[str, nn.Module] = {}
        self._hosts: dict[str, AdaptedModel] = {}

    def model(self, name: str) -> Any:
        """A base in eval mode, the same object each time."""
        if name not in self._models:
            torch.manual_seed(len(name))
            model = FACTORIES[name]().eval()
            with torch.no_grad():  # biases and norms start at constants, which would hide mistakes
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            self._models[name] = model
        return self._models[name]

    def restore_configs(self) -> None:
        """Let every model give a cache back again, as its config said at first."""
        for model in (*self._models.values(), *self._hosts.values()):
            if getattr(model.config, "use_cache", None) is False:
                model.config.use_cache = True

    def host(self, name: str) -> Any:
        """An adapted model without adapters, the same object each time; see `hosted`."""
        if name not in self._hosts:
            self._hosts[name] = adapt(self.model(name)).eval()
        return self._hosts[name]

    @contextmanager
    def hosted(self, name: str) -> Iterator[Any]:
        """The shared adapted model, which keeps its traces; what a test adds is taken away after."""
        host = self.host(name)
        before, active = host._adapter_state.names(), host.active_adapters()
        try:
            yield host
        finally:
            if host._adapter_state.displaced:
                host.unmerge_adapter()
            host.enable_adapters()
            host.delete_adapter([each for each in host._adapter_state.names() if each not in before])
            host.set_adapter(active)
            host.eval().zero_grad()

    def peft(self, name: str, config: peft.PeftConfig, seed: int = 1, **options: Any) -> Any:
        """PEFT's model over a copy of the base, its adapter away from where it starts."""
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(copy.deepcopy(self.model(name)), config, **options).eval()
        return self.randomise(theirs, seed)

    def reference(self, name: str, directory: Any, **options: Any) -> Any:
        """PEFT's model over a copy of the base, with the adapter from a checkpoint."""
        return peft.PeftModel.from_pretrained(copy.deepcopy(self.model(name)), directory, **options).eval()

    def randomise(self, model: Any, seed: int = 1, scale: float = 0.1) -> Any:
        """Move whatever is trainable away from its initial value."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator) * scale
                    parameter.add_(noise.to(parameter.dtype))
        return model

    def batch(self, name: str, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs for the model; all rows but the last are padded on the left."""
        generator = torch.Generator().manual_seed(100 * rows + length + seed)
        if name == "vit":
            return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
        ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows - 1):
            mask[row, : 1 + row % 3] = 0
        batch = {"input_ids": ids.where(mask.bool(), torch.zeros_like(ids)), "attention_mask": mask}
        if name == "t5":
            size = (rows, max(2, length - 2))
            batch["decoder_input_ids"] = torch.randint(5, VOCABULARY, size, generator=generator)
        return batch

    def labels(self, name: str, rows: int, length: int) -> torch.Tensor:
        """Labels for a batch of these sizes."""
        generator = torch.Generator().manual_seed(rows + length)
        if name in ("bert", "vit"):
            return torch.randint(0, 2, (rows,), generator=generator)
        if name == "roberta":
            return torch.randint(0, 2, (rows, length), generator=generator)
        return torch.randint(5, VOCABULARY, (rows, max(2, length - 2) if name == "t5" else length), generator=generator)

    @torch.no_grad()
    def logits(self, model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """What the model computes, where a mask has something to see."""
        logits = model(**batch, **options).logits
        mask = batch.get("attention_mask")
        if mask is None or logits.dim() < 3 or logits.shape[1] != mask.shape[1]:
            return logits
        return logits[mask.bool()]

    def shapes(self, name: str) -> tuple[tuple[int, int], ...]:
        """Batch and sequence sizes to compare at."""
        return ((1, 5), (2, 9), (4, 3)) if name != "vit" else ((1, 1), (2, 1), (5, 1))

    def same(self, one: Any, other: Any, name: str, base: Any = None, near: float = 1e-5, **options: Any) -> None:
        """Both compute the same at every size; `base`, if given, computes something else."""
        for rows, length in self.shapes(name):
            batch = self.batch(name, rows, length)
            ours, theirs = self.logits(one, batch, **options), self.logits(other, batch, **options)
            torch.testing.assert_close(ours, theirs, atol=near, rtol=near)
            if base is not None:
                assert (ours - self.logits(base, batch, **options)).abs().max() > 1e-3

    def snapshot(self, model: nn.Module) -> "Snapshot":
        """Everything of a model that must not change."""
        return Snapshot(model)


class Snapshot:
    """A model's class, attributes, config, tensors, and what a parameter's gradient switch says."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._kind = type(model)
        self._attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        self._hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
        self._config = copy.deepcopy(model.config.to_dict())
        self._tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in self._state()}
        self._training = model.training
        self._forward = model.forward.__func__

    def _state(self) -> list[tuple[str, torch.Tensor]]:
        model = self._model
        return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]

    def check(self) -> None:
        """The model is, object for object and bit for bit, what it was."""
        model = self._model
        assert type(model) is self._kind
        assert {name: set(vars(module)) for name, module in model.named_modules()} == self._attributes
        assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == self._hooks
        assert model.config.to_dict() == self._config
        assert model.training is self._training
        assert model.forward.__func__ is self._forward
        state = dict(self._state())
        assert list(state) == list(self._tensors)
        for name, (before, value) in self._tensors.items():
            now = state[name]
            assert now is before, name
            assert now.dtype == value.dtype, name
            assert torch.equal(now, value), name
            assert now.grad is None, name
        assert all(each.requires_grad for each in model.parameters() if each.is_floating_point())


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    """The models of this session."""
    return Zoo()


@pytest.fixture(autouse=True)
def cache_in_configs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Trainer switches the cache off in the config of a model, which the tests of a session share."""
    zoo = request.getfixturevalue("zoo") if "zoo" in request.fixturenames else None
    yield
    if zoo is not None:
        zoo.restore_configs()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and results repeat."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
