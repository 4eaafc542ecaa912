"""PEFT's classes of models: an adapted model, with the few habits of PEFT's that `compiler.apply` does not have."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from peftc.compiler.api import AdaptedModel, apply, load
from peftc.grammar.diagnostics import ArgumentTypeError, UsageError, fail
from peftc.passes.foreign.peft_routes import METHODS
from peftc.runtime.adapted.adapted_class import adapted_class
from peftc.runtime.base.overlay import BANK
from peftc.runtime.model.described import config_and_name
from peftc.runtime.routing.classifier import ScalingClassifier


class PeftModel(AdaptedModel):
    """An adapted model as PEFT's users have it. What is added to it rests until `set_adapter`; an adapter that is not
    called `default` is saved into a directory of its name, lone or not.
    """

    lone_is_default = False

    def __new__(cls, model: nn.Module, peft_config: Any, adapter_name: str = "default", **options: Any) -> "PeftModel":
        """The model with an adapter of this configuration: see `get_peft_model`."""
        return as_peft(apply(model, {adapter_name: peft_config}, **_known(options)), cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is left to do: `__new__` has made it, and the user's class is not to make another model."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_id: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "PeftModel":
        """The model with a saved adapter, as PEFT's method of this name; `options` are those of `compiler.load`.

        An adapter is where what it adapts is: `device_map`, `torch_device` and the like are taken and change nothing,
        as a base that was loaded with them is followed as it is. Raises UsageError for `ephemeral_gpu_offload`, and as
        `compiler.load`.
        """
        loaded = load(
            model,
            model_id,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            config=config,
            **_known(options | {"ephemeral_gpu_offload": ephemeral_gpu_offload}),
        )
        return as_peft(loaded, cls)

    def add_adapter(  # type: ignore[override]
        self, adapter_name: Any = None, peft_config: Any = None, *more: Any, **options: Any
    ) -> None:
        """Add a fresh adapter, which rests, as PEFT's method of this name. Raises as `AdaptedModel.add_adapter`."""
        config, name = config_and_name(adapter_name, peft_config)
        super().add_adapter(None, name, *more, peft_config=config, **options)

    def load_adapter(  # type: ignore[override]
        self, model_id: Any = None, adapter_name: str = "default", *args: Any, peft_model_id: Any = None, **options: Any
    ) -> Any:
        """As `AdaptedModel.load_adapter`, with the options of PEFT's that say where tensors are to be.

        `peft_model_id` is what transformers calls `model_id`.
        """
        where = model_id if peft_model_id is None else peft_model_id
        if where is None or (model_id is not None and peft_model_id is not None):
            fail(ArgumentTypeError, "E589", "load_adapter takes a directory or repository, once", help="name one")
        return super().load_adapter(where, adapter_name, *args, **_known(options))

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """The model as it is: layers are computed again in a way that no input has to have a gradient for."""
        return model

    def __getattr__(self, name: str) -> Any:
        """As any module; PEFT's methods for what a classifier chooses are the classifier's."""
        if name in METHODS and isinstance(classifier := self.get_route(), ScalingClassifier):
            return getattr(classifier, METHODS[name])
        return super().__getattr__(name)

    @property
    def prefix(self) -> str:
        """What the names of the adapters' parameters have in them, and no other's."""
        return BANK


class PeftModelForCausalLM(PeftModel):
    """A model that writes text on."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder and a decoder."""


class PeftModelForSequenceClassification(PeftModel):
    """A model that sorts texts."""


class PeftModelForTokenClassification(PeftModel):
    """A model that sorts tokens."""


class PeftModelForQuestionAnswering(PeftModel):
    """A model that finds answers in a text."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model that gives hidden states."""


PeftMixedModel = PeftModel
"""Every adapted model may have adapters of several methods at once."""

BY_TASK: dict[str, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}

_PLACES = {"torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"}
"""Options of PEFT's that say where tensors are to be."""


def as_peft(adapted: AdaptedModel, kind: type[PeftModel] = PeftModel) -> PeftModel:
    """An adapted model as one of PEFT's classes: that of its task, where none in particular is asked for."""
    if kind is PeftModel:
        facts, names = adapted._adapter_state.base.facts, adapted._adapter_state.names()
        task = facts.task_type or next((facts.tasks[name] for name in names if facts.tasks.get(name)), None)
        kind = BY_TASK.get(task or "", PeftModel)
    adapted.__class__ = adapted_class(adapted.base_class, kind)
    assert isinstance(adapted, PeftModel)
    return adapted


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of PEFT's as ours. Raises UsageError for one that would change something here."""
    left = {name: value for name, value in options.items() if name not in _PLACES}
    if left.pop("ephemeral_gpu_offload", False):
        fail(UsageError, "E598", "ephemeral_gpu_offload is not supported", help="leave it out")
    if left.get("revision") is None:
        left.pop("revision", None)
    return left
