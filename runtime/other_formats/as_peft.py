"""What another library's file of LoRA weights would be as a PEFT checkpoint of one model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.passes.foreign.key_table import ALPHA, BIAS, MAGNITUDE, A, B, KeyTable
from peftc.passes.foreign.peft import LOW_RANK_TENSORS, low_rank_config
from peftc.runtime.other_formats.other_file import OtherFile, read_other
from peftc.runtime.peft_format.key_spelling import PREFIX
from peftc.runtime.peft_format.peft_names import value_pattern

Shape = tuple[int, ...]

_SHOWN = 3


@dataclass(frozen=True)
class Translated:
    """The fields of an adapter_config.json, tensors by PEFT's keys, and what else is in the file."""

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()


def as_peft(path: Path, weights: Mapping[str, Shape], kind: str) -> Translated:
    """A file's part for a model of this kind, whose modules have `weights` of these shapes.

    Raises CheckpointError for a file that cannot be read, that has no part for the model, or several.
    """
    file = read_other(path)
    found = {part: _placed(file, part, weights) for part in file.parts}
    fitting = [part for part, places in found.items() if all(each is not None for each in places.values())]
    if len(fitting) != 1:
        _refuse(file, found, fitting, kind)
    (part,) = fitting
    names = {module: name for module, name in found[part].items() if name is not None}
    tensors, ranks, alphas = {}, {}, {}
    for module, held in file.parts[part].items():
        name = names[module]
        ranks[name] = held[A].shape[0]
        alphas[name] = float(held[ALPHA]) if ALPHA in held else float(ranks[name])
        for what, tensor in held.items():
            if what in LOW_RANK_TENSORS:
                tensors[f"{PREFIX}{name}.{LOW_RANK_TENSORS[what]}"] = _as_in(tensor, what, weights[name])
    others = [_title(each) for each in file.parts if each != part]
    also = f"{path}: there are also weights for {', '.join(others)}, which are for that model" if others else ""
    config = file.settings.get(part) or _config(
        ranks, alphas, {what for each in file.parts[part].values() for what in each}
    )
    return Translated(config, tensors, (also,) if also else ())


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float], kinds: set[str]) -> dict[str, object]:
    rank, rank_pattern = value_pattern(ranks)
    alpha, alpha_pattern = value_pattern(alphas)
    return low_rank_config(
        sorted(ranks), (rank, rank_pattern), (alpha, alpha_pattern), bias=BIAS in kinds, magnitude=MAGNITUDE in kinds
    )


def _placed(file: OtherFile, part: str, weights: Mapping[str, Shape]) -> dict[str, str | None]:
    """The model's module for each of a part, or None where there is none whose weight fits."""
    spelled: dict[str, list[str]] = {}
    for name in weights:
        for each in _spellings(name, file.keys):
            spelled.setdefault(each, []).append(name)
    placed: dict[str, str | None] = {}
    for module, held in file.parts[part].items():
        names = [name for name in spelled.get(module, ()) if _fits(held, weights[name])]
        placed[module] = names[0] if len(names) == 1 else None
    return placed


def _spellings(name: str, keys: KeyTable) -> set[str]:
    """How the name of a module may stand in a file: with what may be in front of all of them, and without."""
    found = {name, *(f"{each}{name}" for each in keys.outer), *(name.removeprefix(each) for each in keys.outer)}
    return {each.replace(".", "_") for each in found} if keys.flat else found


def _fits(held: Mapping[str, Tensor], weight: Shape) -> bool:
    if A not in held or B not in held or held[A].dim() < 2 or held[B].dim() < 2:
        return False
    rank, (out, *inside) = held[A].shape[0], weight
    size = 1
    for each in inside:
        size *= each
    return held[A].numel() == rank * size and held[B].numel() == out * rank


def _as_in(tensor: Tensor, what: str, weight: Shape) -> Tensor:
    """A tensor with as many axes as PEFT has for a module whose weight is of this shape: a linear's are two."""
    match what:
        case "A":
            return tensor.reshape(tensor.shape[0], *weight[1:])
        case "B":
            return tensor.reshape(weight[0], -1, *(1,) * (len(weight) - 2))
        case _:
            return tensor.reshape(-1)


def _title(part: str) -> str:
    return part.rstrip("._") or "one model"


def _refuse(file: OtherFile, found: Mapping[str, Mapping[str, str | None]], fitting: list[str], kind: str) -> None:
    where = str(file.path)
    parts = ", ".join(_title(each) for each in file.parts)
    if fitting:
        message = f"{' and '.join(_title(each) for each in fitting)} both fit a {kind}"
        fail(CheckpointError, "E372", message, help="put one of them into a file of its own", where=where)
    part, places = max(found.items(), key=lambda each: sum(name is not None for name in each[1].values()))
    missing = [module for module, name in places.items() if name is None]
    shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    message = f"{file.keys.library}'s file has weights for {parts}, and none of these is this {kind}"
    help = f"of {_title(part)} it has no module for {shown}, or one of another size"
    fail(CheckpointError, "E372", message, help=help, where=where)
