"""transformers models from a directory or the Hub: the right class, and what goes wrong said plainly."""

import json
import logging
import socket
import warnings as python_warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import transformers
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from peftc.compiler.load_model.memory import releasing
from peftc.compiler.load_model.storing import Storing, storing
from peftc.grammar.diagnostics import Diagnostic, ModelError, did_you_mean, fail
from peftc.grammar.spec.spec import Quantize
from peftc.passes.foreign import transformers as contract

Loaded = tuple[nn.Module, tuple[str, ...]]

MAX_CONFIG_BYTES = 16 * 2**20


def from_weights(path: Path, name: str, trust_remote_code: bool, quantize: Quantize | None = None) -> Loaded:
    """A model of a directory with config.json and weights, packed as they are read if they are to be.

    Raises ModelError, and SpecError if it has no module that `quantize` skips.
    """
    config = _read(path / "config.json")
    kind, warnings = _class(config, path, trust_remote_code)
    stored = storing(config, kind, path, quantize, str(path / "config.json"), trust_remote_code)
    return _load(kind, str(path), name, warnings, stored, trust_remote_code=trust_remote_code, local_files_only=True)


def from_config(path: Path, name: str, trust_remote_code: bool) -> Loaded:
    """A model of a directory with only a config.json, with torch's present random state. Raises ModelError."""
    raw = _read(path / "config.json")
    kind, warnings = _class(raw, path, trust_remote_code)
    where = str(path / "config.json")
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
            config._name_or_path = name
            if vars(config).pop(contract.QUANTIZATION, None) is not None:
                warnings += (f"{where}: the field 'quantization_config' has no effect on random weights",)
            make: Callable[..., nn.Module] = getattr(kind, "_from_config", None) or kind.from_config
            model = make(config, **({} if hasattr(kind, "_from_config") else {"trust_remote_code": trust_remote_code}))
    except Exception as error:  # a config's own checks, and whatever its model meets
        _refuse("E453", f"no {kind.__name__} can be made of this config", error, where)
    return model.eval(), warnings


def from_hub(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    local_files_only: bool,
    near: str,
    quantize: Quantize | None = None,
) -> tuple[nn.Module, tuple[str, ...], Path]:
    """A model of the Hub, downloaded unless it is in the cache, warnings, and the directory that it is in.

    `near` helps if there is none; `quantize` as in `from_weights`. Raises ModelError and SpecError.
    """
    reachable = not local_files_only and hub_is_known()
    with quiet_transformers():
        path = _fetch_config(name, revision, reachable=reachable, wanted=not local_files_only, near=near)
    config = _read(path)
    kind, warnings = _class(config, path.parent, trust_remote_code)
    stored = storing(config, kind, path.parent, quantize, str(path), trust_remote_code)
    model, warnings = _load(
        kind,
        name,
        name,
        warnings,
        stored,
        revision=revision,
        trust_remote_code=trust_remote_code,
        local_files_only=not reachable,
    )
    return model, warnings, path.parent


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


def _class(config: dict[str, Any], path: Path, trust_remote_code: bool) -> tuple[Any, tuple[str, ...]]:
    """The class to load with: the architecture's own, or an Auto class for code that comes with the model."""
    where = str(path / "config.json" if path.is_dir() else path)
    architecture = _architecture(config, where)
    model_type = config.get("model_type")
    remote = config.get("auto_map")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if isinstance(remote, dict) and (trust_remote_code or not known):
        if not trust_remote_code:
            message = f"the model type {model_type!r} needs code that comes with the model"
            fail(ModelError, "E456", message, help="read that code, then pass --trust-remote-code", where=where)
        automatic = [each for each, target in remote.items() if str(target).endswith(f".{architecture}")]
        automatic += [each for each in remote if each.startswith("AutoModel")]
        return getattr(transformers, automatic[0] if automatic else "AutoModel"), ()
    if not known:
        if model_type is None:
            help = 'a config.json says what it is of: "model_type": "llama"'
            fail(ModelError, "E452", "no field 'model_type'", help=help, where=where)
        help = did_you_mean(str(model_type), CONFIG_MAPPING.keys())
        help = help or f"transformers {transformers.__version__} does not know it; a newer one may"
        fail(ModelError, "E452", f"unknown model_type {model_type!r}", help=help, where=where)
    warnings = _unknown_fields(config, CONFIG_MAPPING[model_type], where)
    if architecture is None:
        message = f"{where}: no field 'architectures': the bare model without a head is meant"
        return transformers.AutoModel, (*warnings, message)
    kind: Any = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        stem = f"{architecture[:3]}"
        names = [each for each in dir(transformers) if each.startswith(stem)]
        help = did_you_mean(architecture, names)
        fail(ModelError, "E452", f"unknown architecture {architecture!r}", help=help, where=where)
    wanted = getattr(getattr(kind, "config_class", None), "model_type", model_type)
    if wanted != model_type:
        message = f"the architecture {architecture!r} is of model_type {wanted!r}, not {model_type!r}"
        fail(ModelError, "E452", message, where=where)
    return kind, warnings


def _architecture(config: dict[str, Any], where: str) -> str | None:
    found = config.get("architectures")
    if not found:
        return None
    if not isinstance(found, list) or not isinstance(found[0], str):
        fail(ModelError, "E452", "field 'architectures' is not a list of names", where=where)
    return found[0]


def _unknown_fields(config: dict[str, Any], kind: type[PreTrainedConfig], where: str) -> tuple[str, ...]:
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


# --- loading ---


def _load(kind: Any, source: str, name: str, warnings: tuple[str, ...], stored: Storing, **options: Any) -> Loaded:
    try:
        with quiet_transformers(), releasing() if stored.quantize else nullcontext():
            model, info = kind.from_pretrained(source, output_loading_info=True, **options, **stored.options)
    except (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, ConnectionError) as error:
        _refuse("E455", "the weights cannot be downloaded", error, name)
    except Exception as error:  # damaged files, shapes that do not fit, a config that does not hold together
        stored.check(error, name)
        _refuse("E454", "the model cannot be loaded", error, name)
    missing = sorted(info.get("missing_keys") or ())
    stored.settle(model, missing, name)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        warnings += (f"{name}: the weights lack {shown}, which are random now",)
    return model.eval(), warnings


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
