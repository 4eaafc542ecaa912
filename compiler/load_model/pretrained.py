"""transformers models from a directory or the Hub: the right class, and what goes wrong said plainly."""

import json
import logging
import socket
import warnings as python_warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from peftc.compiler.load_model.memory import releasing
from peftc.compiler.load_model.model_class import Choice, choose_class
from peftc.compiler.load_model.storing import Storing, read_config, storing, structure
from peftc.compiler.load_model.wanted import NOTHING, Told, Wanted, as_head
from peftc.grammar.diagnostics import Diagnostic, ModelError, fail
from peftc.grammar.spec.spec import Quantize
from peftc.passes.foreign import transformers as contract

MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Loaded:
    """A model, what looks wrong with it, and what was decided about it."""

    model: nn.Module
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def from_weights(
    path: Path, name: str, trust_remote_code: bool, quantize: Quantize | None = None, wanted: Wanted = NOTHING
) -> Loaded:
    """A model of a directory with config.json and weights, packed as they are read if they are to be.

    Raises ModelError, and SpecError if it has no module that `quantize` skips.
    """
    config = _read(path / "config.json")
    choice = choose_class(config, path, trust_remote_code, wanted)
    stored = storing(config, choice.kind, path, quantize, str(path / "config.json"), trust_remote_code)
    head = _head(choice, path, wanted.told, trust_remote_code)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    return _load(choice, head, str(path), name, wanted.told, stored, options)


def from_config(path: Path, name: str, trust_remote_code: bool, wanted: Wanted = NOTHING) -> Loaded:
    """A model of a directory with only a config.json, with torch's present random state. Raises ModelError."""
    choice = choose_class(_read(path / "config.json"), path, trust_remote_code, wanted)
    kind, warnings = choice.kind, choice.warnings
    where = str(path / "config.json")
    head = _head(choice, path, wanted.told, trust_remote_code)
    try:
        with quiet_transformers():
            config = read_config(kind, path, trust_remote_code, head)
            config._name_or_path = name
            if vars(config).pop(contract.QUANTIZATION, None) is not None:
                warnings += (f"{where}: the field 'quantization_config' has no effect on random weights",)
            make: Callable[..., nn.Module] = getattr(kind, "_from_config", None) or kind.from_config
            model = make(config, **({} if hasattr(kind, "_from_config") else {"trust_remote_code": trust_remote_code}))
    except Exception as error:  # a config's own checks, and whatever its model meets
        _refuse("E453", f"no {kind.__name__} can be made of this config", error, where)
    return Loaded(model.eval(), warnings, _notes(choice, model, wanted.told, head))


def from_hub(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    local_files_only: bool,
    near: str,
    quantize: Quantize | None = None,
    wanted: Wanted = NOTHING,
) -> tuple[Loaded, Path]:
    """A model of the Hub, downloaded unless it is in the cache, and the directory that it is in.

    `near` helps if there is none; `quantize` as in `from_weights`. Raises ModelError and SpecError.
    """
    reachable = not local_files_only and hub_is_known()
    with quiet_transformers():
        path = _fetch_config(name, revision, reachable=reachable, wanted=not local_files_only, near=near)
    config = _read(path)
    choice = choose_class(config, path.parent, trust_remote_code, wanted)
    stored = storing(config, choice.kind, path.parent, quantize, str(path), trust_remote_code)
    head = _head(choice, path.parent, wanted.told, trust_remote_code)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": not reachable}
    return _load(choice, head, name, name, wanted.told, stored, options), path.parent


def _head(choice: Choice, path: Path, told: Told, trust_remote_code: bool) -> dict[str, int]:
    """The field of a config that a head needs to be what the adapters have, where the directory has no such head."""
    if choice.is_own or not (told.labels or told.tensors):
        return {}
    plain = structure(choice.kind, path, str(path / "config.json"), trust_remote_code)
    labels = getattr(plain.config, contract.LABEL_COUNT, None)
    if not isinstance(labels, int):
        return {}
    wanted = as_head(told, ((name, each.shape) for name, each in plain.named_parameters()), labels)
    return {} if wanted is None else {contract.LABEL_COUNT: wanted}


def _notes(choice: Choice, model: nn.Module, told: Told, head: Mapping[str, int]) -> tuple[str, ...]:
    """That another class was taken than the directory's own."""
    if choice.is_own or type(model) is choice.own:
        return ()
    labels = "".join(f" of {count} labels" for count in head.values())
    why = f", which {told.by} is for" if told.by and not choice.asked else ""
    instead = "" if choice.own is None else f"; its config.json names {choice.own.__name__}"
    return (f"the model is loaded as a {type(model).__name__}{labels}{why}{instead}",)


# --- config.json ---


def _read(path: Path) -> dict[str, Any]:
    where = str(path)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            fail(ModelError, "E451", f"more than {MAX_CONFIG_BYTES // 2**20} MiB is refused", where=where)
        value = json.loads(path.read_bytes())
    except OSError as error:
        fail(ModelError, "E450", f"cannot read the file: {error.strerror}", where=where)
    except json.JSONDecodeError as error:
        fail(ModelError, "E451", f"not valid JSON: {error.msg}", where=f"{where}:{error.lineno}:{error.colno}")
    except UnicodeDecodeError as error:
        fail(ModelError, "E451", f"not valid JSON: not UTF-8 at byte {error.start}", where=where)
    except ModelError:
        raise
    except (RecursionError, ValueError):
        fail(ModelError, "E451", "not valid JSON: nested too deeply, or a number too long", where=where)
    if not isinstance(value, dict):
        fail(ModelError, "E451", f"not a JSON object but {type(value).__name__}", where=where)
    return value


# --- loading ---


def _load(
    choice: Choice,
    head: Mapping[str, int],
    source: str,
    name: str,
    told: Told,
    stored: Storing,
    options: Mapping[str, Any],
) -> Loaded:
    warnings = choice.warnings
    try:
        with quiet_transformers(), releasing() if stored.quantize else nullcontext():
            model, info = choice.kind.from_pretrained(
                source, output_loading_info=True, **options, **stored.options, **head
            )
    except (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, ConnectionError) as error:
        _refuse("E455", "the weights cannot be downloaded", error, name)
    except Exception as error:  # damaged files, shapes that do not fit, a config that does not hold together
        stored.check(error, name)
        _refuse("E454", "the model cannot be loaded", error, name)
    missing = sorted(info.get("missing_keys") or ())
    stored.settle(model, missing, name)
    missing = [each for each in missing if told.held(each) is None]  # which the adapters bring along
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        warnings += (f"{name}: the weights lack {shown}, which are random now",)
    notes = _notes(choice, model, told, head)
    unread = sorted(info.get("unexpected_keys") or ()) if notes else ()
    if unread:
        shown = ", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if len(unread) > 3 else "")
        notes += (f"a {type(model).__name__} has no place for {shown}, which {name} has",)
    return Loaded(model.eval(), warnings, notes)


def hub_is_known() -> bool:
    """Whether the Hub's name can be looked up. Where it cannot, asking would be tried for half a minute."""
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    if getproxies() or host is None:
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _fetch_config(name: str, revision: str | None, *, reachable: bool, wanted: bool, near: str) -> Path:
    """The config.json of a repository; `wanted` is whether the user lets us ask, `reachable` whether we can."""
    try:
        found = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, local_files_only=not reachable)
    except hub.GatedRepoError:
        fail(ModelError, "E455", f"access to '{name}' must be asked for on the Hub", where=name)
    except hub.RepositoryNotFoundError:
        help = near or "a private repository needs a token"
        fail(ModelError, "E455", "neither a directory here nor a repository on the Hub", help=help, where=name)
    except hub.RevisionNotFoundError:
        fail(ModelError, "E455", f"the repository has no revision '{revision}'", where=name)
    except hub.LocalEntryNotFoundError:
        reason = "the Hub cannot be reached" if wanted else "it is not in the local cache"
        fail(ModelError, "E455", f"no such directory here, and {reason}", help=near, where=name)
    except hub.EntryNotFoundError:
        fail(ModelError, "E455", "the repository has no config.json: it holds no transformers model", where=name)
    except hub.HFValidationError:
        fail(ModelError, "E450", f"no such directory: '{name}'", help=near, where=name)
    except (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, OSError) as error:
        detail = str(error).strip().partition("\n")[0]
        fail(
            ModelError, "E455", "no such directory here, and the Hub cannot be reached", help=near or detail, where=name
        )
    return Path(found)


def _refuse(code: str, what: str, error: Exception, where: str) -> NoReturn:
    lines = [each.strip() for each in str(error).strip().splitlines() if each.strip()] or [type(error).__name__]
    shown = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[1]}"
    raise ModelError(Diagnostic(code, f"{what}: {shown}", where=where)) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers and the Hub's client saying nothing: what the user should know is said by us, once."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
