"""The MODEL argument: from what a user writes to a module."""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from peftc.compiler.load_model.pretrained import from_config, from_hub, from_weights
from peftc.compiler.load_model.wanted import Adapters, Wanted, told_by
from peftc.grammar.diagnostics import Diagnostic, ModelError, did_you_mean, fail
from peftc.grammar.spec.spec import Quantize
from peftc.passes.foreign import transformers as contract
from peftc.runtime.init.dense import INDEX, WEIGHTS
from peftc.runtime.peft_format.adapter_files import CONFIG

_FACTORY = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
_REPO = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WEIGHTS = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class FoundModel:
    """A model and where it is from.

    `origin` is weights (a directory), hub, random (a directory with only a config.json), factory or object (a module
    that was there already); `notes` say aloud what was decided, `warnings` what looks wrong. `tokenizer` is for tokens
    that a spec names by their text; without one it is loaded from where the model is from, with the options `loading`.
    `dense` is the directory of the weights that the model was quantized from as it was loaded.
    """

    model: nn.Module
    name: str
    origin: str
    seed: int | None = None
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    tokenizer: Any | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    dense: Path | None = None


def find_model(
    argument: str | PathLike[str],
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    quantize: Quantize | None = None,
    class_name: str | None = None,
    task: str | None = None,
    adapters: Adapters | None = None,
) -> FoundModel:
    """The model that `peftc compile SPEC MODEL` means.

    Args:
        argument: A directory with a config.json and weights; one with only a config.json, for random weights;
            `package.module:factory`, a function (or module) importable from here or the current directory, that gives
            a module or a pair of a module and example inputs; or a repository on the Hub.
        seed: For random weights and factories. torch's global random state is left as it was.
        trust_remote_code: Run a modelling file that comes with the model.
        revision: Of the repository on the Hub.
        local_files_only: Never ask the Hub.
        quantize: Of a spec: weights are packed one after the other as they are read, so that the dense model is never
            in memory. Random weights and a factory's model are left to `apply`, and so is a model that is quantized
            already, to be compared.
        class_name: A class of transformers to load the directory's or repository's weights with, where that is to be
            another than its config.json names: a bare encoder's with a head. Never code that comes with a model.
        task: One of PEFT's task types (`SEQ_CLS`), for transformers' class for it.
        adapters: What is to be put into the model: a spec, a checkpoint or several by name. Where neither `class_name`
            nor `task` is given, the class is the one they were made for (a spec's `architecture`; a checkpoint's
            manifest, `auto_mapping` or `task_type`), if it is one for this type of model; and a head that the directory
            has not has as many labels as theirs.

    Raises:
        ModelError: what is wrong with the argument, the config or the weights, and what to do instead.
        SpecError: `quantize` would skip modules that there are not.
        CheckpointError: a checkpoint of `adapters` is missing or damaged.
    """
    text = str(argument)
    path = Path(text).expanduser()
    factory = _FACTORY.fullmatch(text)
    wanted = Wanted(class_name or "", task or "")
    with seeded(seed):
        if factory and not _exists(path, text):
            if class_name or task:
                message = f"a factory decides itself what it makes: {class_name or task} has no meaning"
                fail(ModelError, "E468", message, help="let the factory return a model of that class", where=text)
            return _from_factory(text, factory[1], factory[2], seed)
        wanted = replace(wanted, told=told_by(adapters, local_files_only=local_files_only))
        if _exists(path, text):
            return _from_path(path, text, seed, trust_remote_code, quantize, wanted)
        if isinstance(argument, Path) or not _REPO.fullmatch(text):
            fail(ModelError, "E450", f"no such directory: '{text}'", help=_missing_help(path, text), where=text)
        help = _missing_help(path, text)
        made, at = from_hub(text, revision, trust_remote_code, local_files_only, help, quantize, wanted)
    loading = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    dense = _dense(made.model, at, quantize)
    return FoundModel(made.model, text, "hub", notes=made.notes, warnings=made.warnings, loading=loading, dense=dense)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random state set to a seed inside, and what it was before outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _exists(path: Path, text: str) -> bool:
    try:
        return bool(text) and path.exists()
    except (OSError, ValueError):  # too long, or holds a zero
        return False


def _missing_help(path: Path, text: str) -> str:
    if text.endswith(".py") or "::" in text or text.count(":") == 1:
        return "a factory is written package.module:factory"
    try:
        return did_you_mean(path.name, (each.name for each in path.parent.iterdir() if each.is_dir()))
    except (OSError, ValueError):
        return f"'{path.parent}' does not exist either" if len(text) < 4096 and "\0" not in text else ""


# --- directories ---


def _from_path(
    path: Path, text: str, seed: int, trust_remote_code: bool, quantize: Quantize | None, wanted: Wanted
) -> FoundModel:
    if not path.is_dir():
        help = f"give its directory: '{path.parent}'" if path.name in ("config.json", *_WEIGHTS) else ""
        help = help or ("write package.module:factory for code" if path.suffix == ".py" else "")
        fail(ModelError, "E450", "this is a file, not a model's directory", help=help, where=text)
    try:
        present = {each.name for each in path.iterdir()}
    except OSError as error:
        fail(ModelError, "E450", f"cannot read the directory: {error.strerror}", where=text)
    if "config.json" not in present:
        help = did_you_mean("config.json", (each for each in present if not each.startswith(".")))
        if CONFIG in present:
            help = "this is an adapter's directory: give its base model's, or try peftc inspect"
        fail(ModelError, "E450", "no file 'config.json': this is not a model's directory", help=help, where=text)
    loading = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if present & set(_WEIGHTS):
        made = from_weights(path, text, trust_remote_code, quantize, wanted)
        dense = _dense(made.model, path, quantize)
        return FoundModel(
            made.model, text, "weights", notes=made.notes, warnings=made.warnings, loading=loading, dense=dense
        )
    made = from_config(path, text, trust_remote_code, wanted)
    note = f"{text} holds no weights: the model's weights are random, from seed {seed}"
    return FoundModel(
        made.model, text, "random", seed, notes=(note, *made.notes), warnings=made.warnings, loading=loading
    )


def _dense(model: nn.Module, path: Path, quantize: Quantize | None) -> Path | None:
    """The directory, if what it holds was packed as it was loaded."""
    quantizer = getattr(model, contract.QUANTIZER, None)
    packed_here = quantize is not None and quantizer is not None and not quantizer.pre_quantized
    return path if packed_here and any((path / each).is_file() for each in (WEIGHTS, INDEX)) else None


# --- factories ---


def _from_factory(text: str, module_name: str, attribute: str, seed: int) -> FoundModel:
    with _importable_here():
        factory = _attribute(text, _module(text, module_name), attribute)
        with seeded(seed):  # again: an import for the first time may have drawn from it
            made = _call(text, factory)
    inputs = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made, inputs = made
        if not isinstance(inputs, Sequence | Mapping | torch.Tensor):
            message = f"the factory's example inputs are of type {type(inputs).__name__}"
            fail(
                ModelError, "E459", message, help="give a sequence of positional or a mapping of named ones", where=text
            )
    if not isinstance(made, nn.Module):
        message = f"the factory gave an object of type {type(made).__name__}, not a torch.nn.Module"
        fail(ModelError, "E459", message, help="return a module, or (module, example_inputs)", where=text)
    return FoundModel(made, text, "factory", seed, (inputs,) if isinstance(inputs, torch.Tensor) else inputs)


@contextmanager
def _importable_here() -> Iterator[None]:
    """The current directory importable, as under `python -m`; the path is put back as it was found."""
    here = str(Path.cwd())
    before = list(sys.path)
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _module(text: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (name == missing or name.startswith(f"{missing}.")):
            fail(ModelError, "E458", f"importing {name} failed: no module named '{missing}'", where=text)
        parent = Path.cwd().joinpath(*name.split(".")[:-1])
        known = (
            [each.stem for each in parent.iterdir() if each.suffix == ".py" or each.is_dir()] if parent.is_dir() else []
        )
        if name.endswith(".py"):
            fail(ModelError, "E457", f"no module named '{name}'", help="leave the .py out", where=text)
        help = did_you_mean(name.rpartition(".")[2], known) or "modules are looked for here and among the installed"
        fail(ModelError, "E457", f"no module named '{missing}'", help=help, where=text)
    except Exception as error:  # the user's module may raise anything
        _raised(text, f"importing {name} failed", error)


def _attribute(text: str, module: Any, attribute: str) -> Any:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [each for each in vars(found) if not each.startswith("_")]
            own = [each for each in known if inspect.getmodule(getattr(found, each)) is module]
            help = did_you_mean(part, known) or (f"it has {', '.join(own[:8])}" if own else "")
            fail(ModelError, "E457", f"{module.__name__} has no '{attribute}'", help=help, where=text)
        found = getattr(found, part)
    return found


def _call(text: str, factory: Any) -> Any:
    if isinstance(factory, nn.Module) or not callable(factory):
        return factory
    try:
        return factory()
    except Exception as error:  # the user's function may raise anything
        _raised(text, "the factory raised", error)


def _raised(text: str, what: str, error: Exception) -> NoReturn:
    first = (str(error).strip().splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "importlib" not in each.filename]
    place = f"at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    raise ModelError(Diagnostic("E458", f"{what}: {reason}", help=place, where=text)) from error
