"""The class a transformers model is loaded with: what config.json names, or what was asked for where that fits too."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peftc.compiler.load_model.wanted import NOTHING, Told, Wanted
from peftc.grammar.diagnostics import ModelError, did_you_mean, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.foreign.peft import AUTO_CLASSES


@dataclass(frozen=True)
class Choice:
    """A class to load with, an Auto class for code that comes with the model.

    `own` is what config.json names; `asked` whether it is one that somebody asked for.
    """

    kind: Any
    own: Any
    warnings: tuple[str, ...] = ()
    asked: bool = False

    @property
    def is_own(self) -> bool:
        """Whether it is what the directory says it holds."""
        return self.kind is self.own


def choose_class(config: Mapping[str, Any], path: Path, trust_remote_code: bool, wanted: Wanted = NOTHING) -> Choice:
    """The class to load with: the one asked for, one that the adapters are for, or the architecture's own.

    Raises ModelError for a config that names no class, and for a class asked for that does not fit it.
    """
    where = str(path / "config.json" if path.is_dir() else path)
    if wanted.class_name and wanted.task:
        message = f"both a class ({wanted.class_name}) and a task ({wanted.task}) are asked for"
        fail(ModelError, "E468", message, help="give one of the two", where=where)
    if wanted.task and wanted.task not in AUTO_CLASSES:
        help = did_you_mean(wanted.task, AUTO_CLASSES) or f"PEFT's tasks: {', '.join(AUTO_CLASSES)}"
        fail(ModelError, "E468", f"there is no task {wanted.task!r}", help=help, where=where)
    architecture = _architecture(config, where)
    model_type = config.get("model_type")
    remote = config.get("auto_map")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if isinstance(remote, dict) and (trust_remote_code or not known) and not (known and wanted.class_name):
        return _of_remote(remote, architecture, model_type, trust_remote_code, wanted, where)
    if not isinstance(model_type, str) or not known:
        if model_type is None:
            help = 'a config.json says what it is of: "model_type": "llama"'
            fail(ModelError, "E452", "no field 'model_type'", help=help, where=where)
        help = did_you_mean(str(model_type), CONFIG_MAPPING.keys())
        help = help or f"transformers {transformers.__version__} does not know it; a newer one may"
        fail(ModelError, "E452", f"unknown model_type {model_type!r}", help=help, where=where)
    warnings = _unknown_fields(config, CONFIG_MAPPING[model_type], where)
    asked = _asked(wanted, model_type, where)
    if asked is not None:
        return Choice(asked, _misfit(architecture or "", model_type)[0], warnings, asked=True)
    own: Any = transformers.AutoModel
    if architecture is not None:
        own, reason = _misfit(architecture, model_type)
        if own is None:
            fail(ModelError, "E452", reason, help=did_you_mean(architecture, _classes(model_type)), where=where)
    kind, reason = _told(wanted.told, own, model_type)
    if reason and wanted.told.demanded:
        warnings += (f"{wanted.told.by} is for a {wanted.told.classes[0]}: {reason}",)
    if architecture is None and kind is own:
        warnings += (f"{where}: no field 'architectures': the bare model without a head is meant",)
    return Choice(kind, own, warnings)


def _of_remote(
    remote: Mapping[str, Any],
    architecture: str | None,
    model_type: object,
    trust_remote_code: bool,
    wanted: Wanted,
    where: str,
) -> Choice:
    """An Auto class of the code that comes with a model."""
    if wanted.class_name:
        message = (
            f"the model type {model_type!r} comes with code of its own, and {wanted.class_name} is not looked for there"
        )
        fail(ModelError, "E468", message, help="name a task, or leave the class out", where=where)
    if not trust_remote_code:
        message = f"the model type {model_type!r} needs code that comes with the model"
        fail(ModelError, "E456", message, help="read that code, then pass --trust-remote-code", where=where)
    if wanted.task and AUTO_CLASSES[wanted.task] not in remote:
        there = [task for task, name in AUTO_CLASSES.items() if name in remote]
        help = f"it has one for {', '.join(there)}" if there else ""
        message = f"the code that comes with the model has no class for {wanted.task}"
        fail(ModelError, "E468", message, help=help, where=where)
    automatic = [each for each, target in remote.items() if str(target).endswith(f".{architecture}")]
    automatic += [each for each in remote if each.startswith("AutoModel")]
    own = getattr(transformers, automatic[0] if automatic else "AutoModel")
    if wanted.task:
        return Choice(getattr(transformers, AUTO_CLASSES[wanted.task]), own, asked=True)
    told = [each for name in wanted.told.classes for each, at in remote.items() if str(at).endswith(f".{name}")]
    if not told and AUTO_CLASSES.get(wanted.told.task) in remote:
        told = [AUTO_CLASSES[wanted.told.task]]
    return Choice(getattr(transformers, told[0]) if told else own, own)


def _asked(wanted: Wanted, model_type: str, where: str) -> Any | None:
    """The class that was asked for, by its name or as the one for a task; None where none was."""
    if wanted.class_name:
        kind, reason = _misfit(wanted.class_name, model_type)
        if kind is None:
            help = did_you_mean(wanted.class_name, _classes(model_type))
            help = help or f"classes for {model_type!r}: {', '.join(sorted(_classes(model_type)))}"
            fail(ModelError, "E468", reason, help=help, where=where)
        return kind
    if not wanted.task:
        return None
    kind = _for_task(wanted.task, model_type)
    if kind is None:
        there = [each for each in AUTO_CLASSES if _for_task(each, model_type) is not None]
        message = f"transformers has no class for {wanted.task} of model_type {model_type!r}"
        fail(ModelError, "E468", message, help=f"it has some for {', '.join(there)}" if there else "", where=where)
    return kind


def _told(told: Told, own: Any, model_type: str) -> tuple[Any, str]:
    """The class that adapters are for, and why it is not the one that they name; the directory's own otherwise."""
    reason = ""
    above = {each.__name__ for each in getattr(own, "__mro__", ())}
    for name in told.classes:
        if name in above:
            return own, ""
        kind, why = _misfit(name, model_type)
        if kind is not None:
            return kind, ""
        reason = reason or why
    kind = _for_task(told.task, model_type)
    if kind is None or own in _all_for_task(told.task, model_type) or not _bare_fits(told, own):
        return own, reason
    return kind, ""


def _bare_fits(told: Told, own: Any) -> bool:
    """Whether keys allow for the model without a head: as features are, a task is often named where there is one."""
    if AUTO_CLASSES[told.task] != contract.AUTO_MODEL:
        return True
    inside = f"{getattr(own, 'base_model_prefix', '')}."
    return inside == "." or not any(each.startswith(inside) for each in told.tensors)


def _misfit(name: str, model_type: str) -> tuple[Any | None, str]:
    """transformers' class of that name if it is a model of the type, else None and why not."""
    kind: Any = getattr(transformers, name, None) if name else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        return None, f"unknown architecture {name!r}"
    made_for = getattr(kind, "config_class", None)
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", {}).values()
    found = getattr(made_for, "model_type", model_type)
    if found != model_type and made_for not in parts:
        return None, f"the architecture {name!r} is of model_type {found!r}, not {model_type!r}"
    if getattr(kind, "forward", None) is nn.Module.forward:
        return None, f"{name} is what models of model_type {model_type!r} have in common, and none itself"
    return kind, ""


def _for_task(task: str, model_type: str) -> Any | None:
    return next(iter(_all_for_task(task, model_type)), None)


def _all_for_task(task: str, model_type: str) -> Sequence[Any]:
    if task not in AUTO_CLASSES:
        return ()
    mapping = getattr(transformers, AUTO_CLASSES[task])._model_mapping
    if CONFIG_MAPPING[model_type] not in mapping:
        return ()
    found = mapping[CONFIG_MAPPING[model_type]]
    return found if isinstance(found, tuple) else (found,)


def _classes(model_type: str) -> list[str]:
    """Names of transformers' classes for a type of model: those in its module."""
    bare = _for_task("FEATURE_EXTRACTION", model_type)
    module = bare.__module__ if bare is not None else CONFIG_MAPPING[model_type].__module__
    return [
        name
        for name, kind in vars(sys.modules[module]).items()
        if isinstance(kind, type) and kind.__module__ == module and _misfit(name, model_type)[0] is not None
    ]


# --- config.json ---


def _architecture(config: Mapping[str, Any], where: str) -> str | None:
    found = config.get("architectures")
    if not found:
        return None
    if not isinstance(found, list) or not isinstance(found[0], str):
        fail(ModelError, "E452", "field 'architectures' is not a list of names", where=where)
    return found[0]


def _unknown_fields(config: Mapping[str, Any], kind: type[PreTrainedConfig], where: str) -> tuple[str, ...]:
    """A warning for every field the config's class does not know: transformers keeps it and nothing ever reads it."""
    try:
        known = set(vars(kind())) | set(kind().to_dict())
    except Exception:  # some classes have no defaults; then nothing can be said
        return ()
    known |= set(kind.attribute_map) | set(GenerationConfig().to_dict()) | contract.ALSO_IN_CONFIG
    own = [each for each in known if not each.startswith("_")]
    messages = []
    for name in config:
        if name not in known and not hasattr(kind, name):
            help = did_you_mean(name, own)
            messages.append(f"{where}: unknown field '{name}' has no effect" + (f": {help}" if help else ""))
    return tuple(messages)
