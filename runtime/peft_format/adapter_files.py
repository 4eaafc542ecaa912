"""A PEFT checkpoint on disk or on the Hub: finding, reading and writing its files."""

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, did_you_mean, fail
from peftc.passes.foreign import diffusers
from peftc.runtime.files.mapped_file import DamagedFileError, map_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MANIFEST = "peftc_manifest.json"
MAX_CONFIG_BYTES = 16 * 2**20
DEFAULT = "default"
SAFETENSORS = ".safetensors"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_REPO = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def adapter_directory(root: Path, name: str) -> Path:
    """Where an adapter of that name lives under `root`: as in PEFT, "default" at the root, others one below.

    Raises:
        CheckpointError: the name cannot be a directory's (and a module's).
    """
    if not _NAME.fullmatch(name):
        fail(
            CheckpointError,
            "E310",
            f"{name!r} cannot name an adapter",
            help="a name has up to 100 letters, digits, '_' and '-', and starts with none of '-'",
        )
    return root if name == DEFAULT else root / name


def locate(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of a checkpoint: a local one, or one fetched from the Hub (the adapter's files only).

    A file of tensors that is not named as PEFT's is itself what is found: another library's.

    Raises:
        CheckpointError: nothing of that name here or on the Hub, the Hub cannot be reached, or `subfolder` leads out.
    """
    text = str(path_or_id)
    local = Path(path_or_id).expanduser()
    if subfolder:
        _check_relative(subfolder, text)
    if local.is_dir():
        return _inside(local, subfolder)
    if local.is_file() and local.suffix == SAFETENSORS and local.name != WEIGHTS and not subfolder:
        return local
    if local.exists():
        help = f"give its directory: '{local.parent}'"
        fail(CheckpointError, "E301", "this is a file, not a checkpoint's directory", help=help, where=text)
    if isinstance(path_or_id, Path) or not _REPO.fullmatch(text):
        fail(CheckpointError, "E301", f"no such directory: '{text}'", help=_siblings(local), where=text)
    root = _download(text, local, revision, subfolder, token, cache_dir, local_files_only)
    return _inside(root, subfolder)


def read_adapter(directory: Path, *, allow_pickle: bool = False) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The configuration and the tensors of a checkpoint, on the CPU.

    A lone `adapter_model.bin` is read only when `allow_pickle` says so, and then without running code from it.

    Raises:
        CheckpointError: a file is missing, damaged or too large.
    """
    if not directory.is_dir():
        fail(CheckpointError, "E301", f"no such directory: '{directory}'", help=_siblings(directory))
    return read_json(directory / CONFIG), _read_tensors(directory, allow_pickle)


def tensor_names(directory: Path) -> tuple[str, ...]:
    """The keys of a checkpoint's tensors, of which none is read; none where they are pickled, or not there.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        return ()
    try:
        with safe_open(path, "pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError) as error:
        fail(CheckpointError, "E307", f"damaged or truncated: {error}", help="fetch the file again", where=str(path))


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: no such file, too large, not JSON, or not an object.
    """
    where = str(path)
    if not path.is_file():
        present = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        help = did_you_mean(path.name, present)
        if path.name == CONFIG and (path.parent.is_file() or diffusers.WEIGHTS in present):
            help = "this is another library's file of LoRA weights: compiler.load(model, ...) reads it into its model"
        if path.name == CONFIG and not help and {"config.json", "model.safetensors"} & set(present):
            help = "this is a model's directory, not an adapter's"
        fail(CheckpointError, "E302", f"no file '{path.name}'", help=help, where=str(path.parent))
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            limit = MAX_CONFIG_BYTES // 2**20
            fail(CheckpointError, "E305", f"the file has {size} bytes; more than {limit} MiB is refused", where=where)
        value = json.loads(path.read_bytes())
    except OSError as error:
        fail(CheckpointError, "E302", f"cannot read the file: {error.strerror}", where=where)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}:{error.colno}"
        fail(CheckpointError, "E303", f"not valid JSON: {error.msg}", where=place)
    except UnicodeDecodeError as error:
        fail(CheckpointError, "E303", f"not valid JSON: not UTF-8 at byte {error.start}", where=where)
    except CheckpointError:
        raise
    except (RecursionError, ValueError):
        fail(CheckpointError, "E303", "not valid JSON: nested too deeply, or a number too long", where=where)
    if not isinstance(value, dict):
        fail(CheckpointError, "E304", f"not a JSON object but {type(value).__name__}", where=where)
    return value


def write_adapter(
    directory: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], *, safe: bool = True
) -> None:
    """Write a checkpoint; each file appears whole or not at all, and what was there stays until then.

    Tensors are pickled unless `safe`. What is there of the other kind would be read first, or in its place: it goes.

    Raises:
        CheckpointError: the directory or a file cannot be written.
    """
    plain = {key: _plain(tensors[key]) for key in sorted(tensors)}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_files(
        directory,
        {
            WEIGHTS if safe else PICKLE: lambda path: _write_tensors(path, plain, safe),
            CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )
    _discard(directory / (PICKLE if safe else WEIGHTS))


def _write_tensors(path: Path, tensors: dict[str, Tensor], safe: bool) -> None:
    if safe:
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def write_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Let each writer fill a temporary sibling; when all have, move them to their names.

    Raises:
        CheckpointError: the directory or a file cannot be written; no name was touched unless moving itself failed.
    """
    mark = secrets.token_hex(6)
    temporary = {name: directory / f".{name}.{mark}" for name in writers}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(temporary[name])
        for name, path in temporary.items():
            os.replace(path, directory / name)
    except OSError as error:
        fail(
            CheckpointError, "E350", f"cannot write: {error.strerror or error}", where=str(error.filename or directory)
        )
    except SafetensorError as error:
        fail(CheckpointError, "E350", f"cannot write: {error}", where=str(directory))
    finally:
        for path in temporary.values():
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a leftover; a directory that could not be written has none."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, and sharing memory with no other: safetensors refuses views."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError if it is damaged."""
    try:
        return map_tensors(path)
    except (DamagedFileError, OSError) as error:
        fail(CheckpointError, "E307", f"damaged or truncated: {error}", help="fetch the file again", where=str(path))


def _read_tensors(directory: Path, allow_pickle: bool) -> dict[str, Tensor]:
    weights, unsafe = directory / WEIGHTS, directory / PICKLE
    if weights.is_file():
        return read_tensors(weights)
    if not unsafe.is_file():
        help = did_you_mean(WEIGHTS, (each.name for each in directory.iterdir()))
        fail(CheckpointError, "E302", f"no file '{WEIGHTS}'", help=help, where=str(directory))
    if not allow_pickle:
        fail(
            CheckpointError,
            "E306",
            "a pickle, which may run code when it is read, is refused",
            help=f"ask for '{WEIGHTS}' instead, or load with allow_pickle=True if you trust where it comes from",
            where=str(unsafe),
        )
    try:
        loaded = torch.load(unsafe, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        first = str(error).partition("\n")[0]
        fail(CheckpointError, "E307", f"damaged, or holds more than tensors: {first}", where=str(unsafe))
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        fail(CheckpointError, "E307", "does not hold tensors by name", where=str(unsafe))
    return dict(loaded)


def _check_relative(subfolder: str, where: str) -> None:
    parts = Path(subfolder).parts
    if Path(subfolder).is_absolute() or ".." in parts or "\\" in subfolder or "\0" in subfolder:
        fail(CheckpointError, "E309", f"the subfolder '{subfolder}' leads out of the checkpoint", where=where)


def _inside(root: Path, subfolder: str | None) -> Path:
    found = root / subfolder if subfolder else root
    if not found.resolve().is_relative_to(root.resolve()):
        message = f"the subfolder '{subfolder}' leads out of the checkpoint, through a link"
        fail(CheckpointError, "E309", message, where=str(root))
    if not found.is_dir():
        fail(CheckpointError, "E301", f"no subfolder '{subfolder}'", help=_siblings(found), where=str(root))
    return found


def _siblings(path: Path) -> str:
    """What is near a missing directory: names like its own, or that its parent is missing too."""
    near = _near(path)
    return f"'{path.parent}' does not exist either" if not near and not path.parent.exists() else near


def _near(path: Path) -> str:
    try:
        return did_you_mean(path.name, (each.name for each in path.parent.iterdir() if each.is_dir()))
    except OSError:
        return ""


def _download(
    repo: str,
    local: Path,
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    near = _near(local)
    try:
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[inside + name for name in (CONFIG, WEIGHTS, PICKLE, MANIFEST, diffusers.WEIGHTS)],
        )
    except hub.GatedRepoError:
        fail(CheckpointError, "E308", f"access to '{repo}' must be asked for on the Hub", where=repo)
    except hub.RepositoryNotFoundError:
        help = near or "a private repository needs a token"
        fail(CheckpointError, "E308", f"neither a directory here nor a repository on the Hub: '{repo}'", help=help)
    except hub.RevisionNotFoundError:
        fail(CheckpointError, "E308", f"'{repo}' has no revision '{revision}'", where=repo)
    except hub.HFValidationError:
        fail(CheckpointError, "E301", f"no such directory: '{repo}'", help=near, where=repo)
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError, hub.HfHubHTTPError) as error:
        reason = "it is not in the local cache" if local_files_only else "the Hub cannot be reached"
        detail = str(error).strip().partition("\n")[0]
        fail(CheckpointError, "E308", f"no directory '{repo}' here, and {reason}", help=near or detail, where=repo)
    return Path(found)
