"""What is in a PEFT checkpoint, and the spec it amounts to. No model is needed."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import torch

from peftc.compiler.export_model.output import is_build
from peftc.compiler.report.facts import CheckpointFacts, ModuleFacts
from peftc.compiler.report.summary import brief
from peftc.grammar.diagnostics import CheckpointError, Diagnostic, fail
from peftc.grammar.method.rule import MethodRule, Value
from peftc.grammar.syntax import tree
from peftc.passes.plan.site import WHOLE
from peftc.runtime.peft_config.peft_config import ConfigFacts, read_config
from peftc.runtime.peft_config.spec_config import known_methods, spec_text
from peftc.runtime.peft_format.adapter_files import CONFIG, DEFAULT, locate, read_adapter, read_json, tensor_names
from peftc.runtime.peft_format.key_spelling import PREFIX
from peftc.runtime.peft_format.manifest import Manifest, read_manifest
from peftc.runtime.peft_format.older_files import with_heads

# What PEFT puts between a module's name and a tensor that it saved whole.
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save|original_module|token_adapter)(?=\.|$)")


def inspect(
    path_or_id: str | PathLike[str],
    *,
    use: str | PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> CheckpointFacts:
    """What is in a checkpoint: its method and values, the modules it adapts with their tensors, its base, its manifest.

    Args:
        path_or_id: A directory, or a repository on the Hub.
        use: An `.adapter` file with methods of your own.
        revision: Of the repository on the Hub.
        local_files_only: Never ask the Hub.

    Returns:
        The facts. A method or field that is not supported is among their `problems`, and the tensors are told anyway.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    directory = _locate(path_or_id, revision, local_files_only)
    config, tensors = read_adapter(directory)
    problems: tuple[Diagnostic, ...] = ()
    facts: ConfigFacts | None = None
    try:
        facts = _facts(config, directory, DEFAULT, use)
    except CheckpointError as error:
        problems = error.diagnostics
    rule = facts.spec.rule if facts else None
    manifest = read_manifest(directory)
    return CheckpointFacts(
        directory=str(directory),
        peft_type=str(config.get("peft_type", "")),
        method=rule.name if rule else None,
        values=dict(facts.spec.values) if facts else {},
        brief=brief(rule, dict(facts.spec.values)) if facts and rule else "",
        base=_text(config.get("base_model_name_or_path")),
        revision=_text(config.get("revision")),
        task_type=_text(config.get("task_type")),
        modules=_modules(tensors, rule),
        parameters=sum(each.numel() for each in tensors.values()),
        bytes=sum(each.numel() * each.element_size() for each in tensors.values()),
        manifest=asdict(manifest) if manifest else None,
        warnings=facts.warnings if facts else (),
        problems=problems,
    )


def decompile(
    path_or_id: str | PathLike[str],
    *,
    name: str | None = None,
    use: str | PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> str:
    """A checkpoint's adapter_config.json as the text of a spec, with what its manifest says of regions.

    A head that its task trains and its config does not name is in the text if it is in the file.

    Args:
        path_or_id: A directory, or a repository on the Hub.
        name: What to call the adapter; by default as in the manifest, or `default`.
        use: An `.adapter` file with methods of your own.
        revision: Of the repository on the Hub.
        local_files_only: Never ask the Hub.

    Raises:
        CheckpointError: the file is missing or damaged, or says what is not supported.
    """
    directory = _locate(path_or_id, revision, local_files_only)
    config = read_json(directory / CONFIG)
    manifest = read_manifest(directory)
    facts = _facts(config, directory, name or _saved_name(manifest), use)
    for message in facts.warnings:
        warnings.warn(message, stacklevel=2)
    spec, _ = with_heads(facts.spec, facts.task_type, tensor_names(directory))
    return spec_text(spec, manifest.regions if manifest else None)


def _locate(path_or_id: str | PathLike[str], revision: str | None, local_files_only: bool) -> Path:
    target = path_or_id if isinstance(path_or_id, str) else Path(path_or_id)
    directory = locate(target, revision=revision, local_files_only=local_files_only)
    if not (directory / CONFIG).exists() and is_build(directory):
        inside = sorted(str(each.parent) for each in directory.glob(f"adapters/*/{CONFIG}"))
        help = f"its adapters are {', '.join(inside)}"
        fail(CheckpointError, "E302", "this is a build, not a checkpoint", help=help, where=str(directory))
    return directory


def _facts(config: Mapping[str, object], directory: Path, name: str, use: str | PathLike[str] | None) -> ConfigFacts:
    methods = known_methods(config, directory, use)
    return read_config(config, methods=methods, adapter_name=name, where=str(directory / CONFIG), strict=False)


def _saved_name(manifest: Manifest | None) -> str:
    names = list(manifest.adapters) if manifest else []
    return names[0] if len(names) == 1 else DEFAULT


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


# --- tensors ---


def _modules(tensors: Mapping[str, torch.Tensor], rule: MethodRule | None) -> tuple[ModuleFacts, ...]:
    """Modules whose tensors have the same names, sizes of the method's, and types, together."""
    suffixes = {saved: param.shape for param in (rule.params if rule else ()) for _, saved in param.saved}
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, leaf = _split(key.removeprefix(PREFIX), suffixes)
        by_module.setdefault(module, {})[leaf] = tensor
    groups: dict[object, list[str]] = {}
    values: dict[object, dict[str, Value]] = {}
    for module, found in by_module.items():
        sizes = _sizes(found, suffixes, rule)
        dtypes = tuple(sorted({_dtype(each) for each in found.values()}))
        group = (tuple(sizes.items()), tuple(sorted(found)), dtypes)
        groups.setdefault(group, []).append(module)
        values[group] = sizes
    facts = []
    for alike, modules in groups.items():
        held = [by_module[module] for module in modules]
        facts.append(
            ModuleFacts(
                modules=tuple(each or _place(rule) for each in modules),
                values=values[alike],
                tensors=tuple(sorted(held[0])),
                dtypes=tuple(sorted({_dtype(each) for each in held[0].values()})),
                parameters=sum(tensor.numel() for each in held for tensor in each.values()),
            )
        )
    return tuple(facts)


def _place(rule: MethodRule | None) -> str:
    """Whose the tensors are that stand beside every module: those of a place that is no weight."""
    kinds = rule.kinds if rule is not None else ()
    return next((f"@{kind}" for kind in WHOLE if kind in kinds), "")


def _split(key: str, suffixes: Mapping[str, object]) -> tuple[str, str]:
    for suffix in suffixes:
        if key.endswith(f".{suffix}"):
            return _WRAPPERS.sub("", key.removesuffix(f".{suffix}")), suffix
    module, _, leaf = key.rpartition(".")
    return _WRAPPERS.sub("", module), leaf


def _sizes(
    tensors: Mapping[str, torch.Tensor],
    suffixes: Mapping[str, tuple[tree.Expr, ...]],
    rule: MethodRule | None,
) -> dict[str, Value]:
    """The hyperparameters that an axis of a tensor tells, such as a rank."""
    names = {each.name for each in rule.hyperparameters} if rule else set()
    found: dict[str, Value] = {}
    for leaf, tensor in tensors.items():
        for size, symbol in zip(tensor.shape, suffixes.get(leaf, ()), strict=False):
            if isinstance(symbol, tree.Name) and symbol.id in names:
                found[symbol.id] = size
    return found


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
