"""PEFT as the oracle on releases of transformers that it does not know yet.

transformers 5.24 calls a forward's cache `cache`. peft 0.21 hands `generate` the prefix under the name before, where it
is ignored, looks for a cache there and finds none, and refuses classifiers whose forwards have no such argument. Here
peft sees and says the old name and transformers the new one, so what is computed is PEFT's. And transformers 5.24 has
its own `load_adapter` ask for a peft that is not released; what it does with a file is asked all the same.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import transformers as hf
import transformers.integrations.peft as transformers_peft
from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM, peft_model

NOW, BEFORE = "cache", "past_key_values"
GENERATING = (PeftModelForCausalLM, PeftModelForSeq2SeqLM)
READING = (
    peft_model.PeftModelForSequenceClassification,
    peft_model.PeftModelForTokenClassification,
    peft_model.PeftModelForQuestionAnswering,
)


def knows_transformers() -> bool:
    """Whether this peft asks for a cache as this transformers calls it."""
    takes = inspect.signature(hf.LlamaForCausalLM.forward).parameters
    asks = inspect.getsource(PeftModelForCausalLM.prepare_inputs_for_generation)
    return NOW not in takes or f'.get("{NOW}"' in asks


def renamed(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in values.items() if name != new or old not in values}


def _prepares(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inner = self.base_model_prepare_inputs_for_generation

        def inner_before(*call: Any, **named: Any) -> dict[str, Any]:
            return renamed(inner(*call, **named), NOW, BEFORE)

        with patch.object(self, "base_model_prepare_inputs_for_generation", inner_before):
            return renamed(original(self, *args, **kwargs), BEFORE, NOW)

    return prepare


def _reads(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        backbone = self.base_model.get_submodule(self.transformer_backbone_name)
        with _as_before(self.base_model), _as_before(backbone):
            return original(self, *args, **kwargs)

    return read


@contextmanager
def _as_before(module: Any) -> Iterator[None]:
    """The module with a forward whose cache has the old name, if it takes one."""
    signature = inspect.signature(module.forward)
    if NOW not in signature.parameters:
        yield
        return
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **renamed(kwargs, BEFORE, NOW))

    parameters = [each.replace(name=BEFORE if name == NOW else name) for name, each in signature.parameters.items()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with patch.object(module, "forward", forward):
        yield


@contextmanager
def peft_as_oracle() -> Iterator[None]:
    """Inside, peft computes with this transformers what it means to."""
    if knows_transformers():
        yield
        return
    installed = importlib.metadata.version("peft")
    changed = [(kind, "prepare_inputs_for_generation", _prepares) for kind in GENERATING]
    changed += [(kind, "_prefix_tuning_forward", _reads) for kind in READING]
    patches: list[Any] = [patch.object(transformers_peft, "MIN_PEFT_VERSION", installed)]
    patches += [patch.object(kind, name, how(getattr(kind, name))) for kind, name, how in changed]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
