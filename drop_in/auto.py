"""PEFT's classes that find the base by themselves: the adapter's file says which it is."""

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.passes.foreign.peft import AUTO_CLASSES
from peftc.peft.models import PeftModel
from peftc.runtime.peft_format.adapter_files import CONFIG, locate, read_json

_HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_TOKENIZER = "tokenizer_config.json"


class AutoPeftModel:
    """Loads a saved adapter and its base, whose class the adapter's file says."""

    target: ClassVar[str] = ""  # transformers' class that finds the base; empty where the file says it

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is not made, but loaded: {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **options: Any,
    ) -> PeftModel:
        """The base with the adapter; `options` beside those of `PeftModel.from_pretrained` are the base's class's.

        Where a tokenizer lies beside the adapter, the base is resized to it, as in PEFT. Raises CheckpointError where
        the file names no base or class, and as `PeftModel.from_pretrained`.
        """
        hub = {name: options.pop(name) for name in _HUB if name in options}
        path = pretrained_model_name_or_path
        directory = locate(path if isinstance(path, str) else Path(path), **hub)
        config = read_json(directory / CONFIG)
        named = config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            help = "load the base yourself, and pass it to PeftModel.from_pretrained"
            fail(
                CheckpointError,
                "E599",
                "the adapter does not say what it was trained on",
                help=help,
                where=str(directory),
            )
        own: dict[str, Any] = {
            name: options.pop(name) for name in ("autocast_adapter_dtype", "key_mapping", "config") if name in options
        }
        if options.get("ignore_mismatched_sizes"):  # of the base and of the adapter
            own["ignore_mismatched_sizes"] = True
        base: nn.Module = cls._class(config, directory).from_pretrained(
            named, revision=config.get("revision"), **options
        )
        if (directory / _TOKENIZER).is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
            if len(tokenizer) != base.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
                base.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
        return PeftModel.from_pretrained(base, path, adapter_name, is_trainable, **own, **hub)

    @classmethod
    def _class(cls, config: dict[str, Any], directory: Path) -> Any:
        if cls.target:
            return getattr(transformers, cls.target)
        mapped = config.get("auto_mapping") or {}
        name = mapped.get("base_model_class") or AUTO_CLASSES.get(str(config.get("task_type")))
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if found is None or not hasattr(found, "from_pretrained"):
            help = "use the class for its task, such as AutoPeftModelForCausalLM"
            fail(
                CheckpointError,
                "E599",
                "the adapter does not say the class of its base",
                help=help,
                where=str(directory),
            )
        return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For models that write text on."""

    target = AUTO_CLASSES["CAUSAL_LM"]


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For models with an encoder and a decoder."""

    target = AUTO_CLASSES["SEQ_2_SEQ_LM"]


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For models that sort texts."""

    target = AUTO_CLASSES["SEQ_CLS"]


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For models that sort tokens."""

    target = AUTO_CLASSES["TOKEN_CLS"]


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For models that find answers in a text."""

    target = AUTO_CLASSES["QUESTION_ANS"]


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models that give hidden states."""

    target = AUTO_CLASSES["FEATURE_EXTRACTION"]
