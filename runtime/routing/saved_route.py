"""A route in PEFT's format: the classifier's tensors and configuration, which names its adapters and where they lie."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.passes.foreign import peft as contract
from peftc.passes.foreign import peft_routes as names
from peftc.runtime.peft_config.json_fields import FieldReader
from peftc.runtime.peft_format.adapter_files import tensor_names
from peftc.runtime.routing.classifier import ClassifierSettings, ScalingClassifier


@dataclass(frozen=True)
class SavedRoute:
    """What a configuration says of a route; `adapters` are where they lie, by name."""

    settings: ClassifierSettings
    adapters: Mapping[str, str]
    task_type: str | None


def is_route(config: Mapping[str, object]) -> bool:
    """Whether a configuration is of a route, and not of an adapter."""
    return config.get(contract.TYPE) == names.ROUTED_TYPE


def read_route(config: Mapping[str, object], where: str, *, strict: bool = True) -> SavedRoute:
    """What a configuration says. Raises CheckpointError with all that is wrong at once."""
    reader = FieldReader(config, where, strict=strict)
    known = {*names.SETTINGS.values(), *names.COMMON, names.EXPERTS}
    reader.unknown([each for each in config if each not in known and not each.startswith("_")], known)
    values = {own: _value(reader, own, theirs) for own, theirs in names.SETTINGS.items()}
    settings = ClassifierSettings(**{name: value for name, value in values.items() if value is not None})
    adapters = reader.table(names.EXPERTS) or {}
    if not adapters or not all(isinstance(each, str) for each in adapters.values()):
        help = "give the directory, or the repository, of each by its name"
        reader.problem("E321", f"field '{names.EXPERTS}' names no adapters", help)
    _check(reader, settings, len(adapters))
    task = reader.text("task_type")
    if reader.problems:
        raise CheckpointError(*reader.problems)
    for message in reader.warnings:
        warnings.warn(message, stacklevel=4)
    return SavedRoute(settings, {name: str(each) for name, each in adapters.items()}, task)


def _value(reader: FieldReader, own: str, theirs: str) -> Any:
    kind = next(each.type for each in fields(ClassifierSettings) if each.name == own)
    if kind is bool:
        return reader.get(theirs, bool, "true or false")
    if kind is float:
        return reader.get(theirs, (int, float), "a number")
    return reader.get(theirs, int, "a whole number")


def _check(reader: FieldReader, settings: ClassifierSettings, adapters: int) -> None:
    def refuse(name: str, wanted: str) -> None:
        reader.problem("E321", f"field '{names.SETTINGS[name]}' = {getattr(settings, name)} is not {wanted}")

    for name in ("hidden_size", "depth", "size"):
        if getattr(settings, name) < 1:
            refuse(name, "a positive number")
    if settings.top_k is not None and not 1 <= settings.top_k <= max(adapters, 1):
        refuse("top_k", f"from 1 to {adapters}")
    if not 0 <= settings.dropout < 1:
        refuse("dropout", "from 0 to below 1")
    if settings.temperature <= 0:
        refuse("temperature", "above 0")


def place_of(directory: Path, name: str, said: str) -> str | Path:
    """Where an adapter of a saved route lies: below it, or where its configuration says.

    Raises CheckpointError where all there is of it is what PEFT saves for one beside a route: the whole model, under
    names in which some layers have lost their numbers.
    """
    own = directory / name
    if Path(name).name == name and own.is_dir():
        if not any(key.startswith(names.WHOLE) for key in tensor_names(own)):
            return own
        if not Path(said).expanduser().exists():
            message = f"adapter {name!r} was saved as a part of the model, and its tensors' names are damaged"
            places = f"'{names.EXPERTS}': {{{name!r}: 'DIRECTORY', ..}}"
            help = f"say where it was saved by itself: config={{'peft_type': '{names.ROUTED_TYPE}', {places}}}"
            fail(CheckpointError, "E302", message, help=help, where=str(own))
    below = directory / said
    inside = not Path(said).is_absolute() and directory.resolve() in below.resolve().parents
    return below if inside and below.is_dir() else said


def fill(classifier: ScalingClassifier, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put a checkpoint's tensors into a classifier. Raises CheckpointError and changes nothing unless they are its."""
    check_tensors(classifier, tensors, where)
    classifier.load_state_dict({key.removeprefix(names.KEYS): value for key, value in tensors.items()})


def check_tensors(classifier: ScalingClassifier, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError unless these are all of a classifier's tensors."""
    found = {key.removeprefix(names.KEYS): value for key, value in tensors.items()}
    own = classifier.state_dict()
    missing, more = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing:
        message = f"missing key '{names.KEYS}{missing[0]}', of the classifier"
        help = "PEFT leaves it out where an adapter has a number for its name: save model.state_dict()'s under this key"
        fail(CheckpointError, "E340", message, help=help, where=where)
    if more:
        fail(CheckpointError, "E341", f"unexpected key '{more[0]}'", help="is it another route's?", where=where)
    for key, value in own.items():
        if value.shape != found[key].shape:
            message = f"'{names.KEYS}{key}' has the sizes {list(found[key].shape)}, expected {list(value.shape)}"
            help = "it was trained for other adapters, or for other places of theirs"
            fail(CheckpointError, "E342", message, help=help, where=where)


def route_config(classifier: ScalingClassifier, adapters: Mapping[str, str]) -> dict[str, object]:
    """The fields of a classifier's configuration, for adapters that lie there."""
    settings = {theirs: getattr(classifier.settings, own) for own, theirs in names.SETTINGS.items()}
    return {contract.TYPE: names.ROUTED_TYPE, **settings, names.EXPERTS: dict(adapters)}


def route_tensors(classifier: ScalingClassifier, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's tensors under PEFT's keys; `given` are some to take in their place, by the classifier's names."""
    return {f"{names.KEYS}{key}": given.get(key, value) for key, value in classifier.state_dict().items()}
