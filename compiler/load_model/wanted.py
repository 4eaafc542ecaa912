"""As what a model is to be loaded: what was asked for, and what the adapters that it gets were made for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.grammar.spec.elaborate import names_file, read_spec
from peftc.grammar.spec.spec import Spec
from peftc.grammar.syntax import tree
from peftc.passes.foreign import transformers as contract
from peftc.runtime.other_formats.other_file import other_file
from peftc.runtime.peft_format.adapter_files import CONFIG, WEIGHTS, locate, read_json
from peftc.runtime.peft_format.key_spelling import PREFIX
from peftc.runtime.peft_format.manifest import read_manifest

Shape = tuple[int, ...]
Adapters = Spec | str | PathLike[str] | Mapping[str, str | PathLike[str]]

_COPY = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)")


@dataclass(frozen=True)
class Told:
    """What adapters say of the model that they are for.

    `classes` are names of its class, the surest first; `task` is PEFT's word, for where no class fits; `labels` is how
    many a head is to have. `tensors` are the shapes of what a checkpoint holds, by PEFT's names without its prefix.
    `by` says it, and with `demanded` it is to be told why no class fits.
    """

    by: str = ""
    classes: tuple[str, ...] = ()
    task: str = ""
    labels: int | None = None
    tensors: Mapping[str, Shape] = field(default_factory=dict)
    demanded: bool = False

    def held(self, name: str) -> Shape | None:
        """The shape of the tensor that stands in place of the model's one of this name, if there is such."""
        return self.tensors.get(name)


@dataclass(frozen=True)
class Wanted:
    """As what a model is to be loaded. A class or a task that was asked for is taken or refused; else adapters tell."""

    class_name: str = ""
    task: str = ""
    told: Told = Told()


NOTHING = Wanted()


def told_by(adapters: Adapters | None, *, local_files_only: bool = False) -> Told:
    """What a spec, a checkpoint, or the first of several that says something, tells of the class of its model.

    Raises:
        CheckpointError: a checkpoint is not there, or its config or manifest is damaged.
        SpecError: a file of adapters is wrong.
    """
    if adapters is None:
        return Told()
    if isinstance(adapters, Mapping):
        all_told = [_by_checkpoint(each, local_files_only) for each in adapters.values()]
        return next((each for each in all_told if each.classes or each.task), Told())
    if not isinstance(adapters, Spec) and names_file(str(adapters)):
        adapters = read_spec(Path(adapters))
    return _by_spec(adapters) if isinstance(adapters, Spec) else _by_checkpoint(adapters, local_files_only)


def _by_spec(spec: Spec) -> Told:
    said = {each.name: each.value for each in (spec.base.entries if spec.base else ())}
    name, labels = said.get("architecture"), said.get(contract.LABEL_COUNT)
    if not isinstance(name, tree.Text):
        return Told()
    count = labels.value if isinstance(labels, tree.Number) and isinstance(labels.value, int) else None
    return Told("the spec", (name.value,), labels=count, demanded=True)


def _by_checkpoint(path_or_id: str | PathLike[str], local_files_only: bool) -> Told:
    target = path_or_id if isinstance(path_or_id, str) else Path(path_or_id)
    directory = locate(target, local_files_only=local_files_only)
    if other_file(directory) is not None:
        return Told()
    config = read_json(directory / CONFIG)
    manifest = read_manifest(directory)
    classes = [] if manifest is None else [manifest.base_class]
    automatic = config.get("auto_mapping")
    if isinstance(automatic, dict) and isinstance(automatic.get("base_model_class"), str):
        classes.append(automatic["base_model_class"])
    task = config.get("task_type")
    return Told(
        str(path_or_id), tuple(classes), task if isinstance(task, str) else "", tensors=_tensors(directory / WEIGHTS)
    )


def _tensors(path: Path) -> dict[str, Shape]:
    """The shapes in a file of tensors; none of a pickle, which is not opened for this."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return {_plain(key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        message = f"damaged or truncated: {error}"
        fail(CheckpointError, "E307", message, help="fetch the file again", where=str(path))


def _plain(key: str) -> str:
    return _COPY.sub("", key.removeprefix(PREFIX))


def as_head(told: Told, tensors: Iterator[tuple[str, Sequence[int]]], labels: int) -> int | None:
    """How many labels an adapter's own head has, where that is another number than the model's.

    `tensors` are the model's, as it is with `labels`: those that the adapter holds may differ in that number alone.
    """
    if told.labels is not None:
        return told.labels
    counts = set()
    for name, shape in tensors:
        held = told.held(name)
        if held is not None and held[:1] != tuple(shape[:1]) == (labels,) and held[1:] == tuple(shape[1:]):
            counts.add(held[0])
    return counts.pop() if len(counts) == 1 else None
