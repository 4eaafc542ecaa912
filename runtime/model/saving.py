"""Saving and loading adapters of a model in the PEFT format."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftc.grammar.diagnostics import CheckpointError, SpecError, UsageError, fail
from peftc.grammar.method.rule import Value
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.syntax import layout
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan, ParamKey
from peftc.passes.plan.sites import tied_names
from peftc.runtime.adapters.bank import AdapterParameters, trained_keys
from peftc.runtime.base.base import BANK, base_tensors, base_values, identity, is_adapters, quantization
from peftc.runtime.execution.storage import check_trainable, without_packed
from peftc.runtime.init.initial import initial
from peftc.runtime.init.tokens import check_ties, needed_vocabulary
from peftc.runtime.model.state import AdapterState
from peftc.runtime.peft_format.adapter_files import adapter_directory, locate, read_adapter, write_adapter, write_files
from peftc.runtime.peft_format.checkpoint import Entry, entries, fit, kept_masks, unpruned
from peftc.runtime.peft_format.manifest import (
    AdapterFacts,
    Manifest,
    compare,
    fingerprint,
    read_manifest,
    spec_digest,
    write_manifest,
)
from peftc.runtime.peft_format.peft_config import read_config, write_config
from peftc.runtime.peft_format.peft_rule import mask_field, with_values
from peftc.runtime.peft_format.saved_value import settled, settled_value
from peftc.runtime.peft_format.spec_config import check_growth, known_methods, spec_text

# A Trainer resumes a model that is not peft's only from this file, and saves nowhere else under such names.
TRAINER_STATE = "model.safetensors"
_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")


class Saving(nn.Module):
    """The part of an adapted model that reads and writes checkpoints."""

    _adapter_state: AdapterState

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        selected_adapters: Sequence[str] | None = None,
        safe_serialization: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write adapters, not the base, in the format `peft` and transformers load.

        As PEFT does, the adapter called `default`, or a lone one, goes into the directory itself and every other into
        a subdirectory of its name. A manifest with the spec and the base's fingerprint lies beside each. Values come
        from `state_dict` (of this model) if one is given. In a Trainer's checkpoint (a directory called
        `checkpoint-<step>`) the adapters' part of the state dict is saved too, from which the Trainer resumes.

        Raises UsageError for unknown adapters, `safe_serialization=False` and `push_to_hub`, CheckpointError if a file
        cannot be written; files appear whole or not at all.
        """
        if not safe_serialization:
            fail(UsageError, "E540", "adapters are saved as safetensors only", help="leave safe_serialization out")
        if kwargs.get("push_to_hub"):
            fail(UsageError, "E542", "save_pretrained does not upload", help="call push_to_hub")
        if not is_main_process:
            return
        state = self._adapter_state
        names = tuple(selected_adapters) if selected_adapters is not None else state.names()
        adapters = [state.adapter(name) for name in names]
        root = Path(save_directory)
        if root.is_file():
            fail(UsageError, "E541", f"{root} is a file", help="give a directory")
        base_fingerprint = self.base_fingerprint()
        for adapter in adapters:
            name = "default" if len(state.names()) == 1 else adapter.plan.name
            self._save(adapter, adapter_directory(root, name), state_dict, base_fingerprint)
        if _TRAINER_CHECKPOINT.fullmatch(root.name):
            given = self.state_dict() if state_dict is None else state_dict
            own = {key: value.detach().cpu().contiguous() for key, value in given.items() if is_adapters(key)}
            write_files(root, {TRAINER_STATE: lambda path: save_file(own, path, metadata={"format": "pt"})})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. A state of adapters alone, loaded with `strict=False`, does not miss the base.

        Base values that differ from the user's do not overwrite them: this model gets tensors of its own for these.
        Raises UsageError where they are those of a weight that is stored packed.
        """
        state_dict = without_packed(self, state_dict)
        _unshare(self, state_dict)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if not strict and all(is_adapters(key) for key in state_dict):
            result.missing_keys[:] = [key for key in result.missing_keys if is_adapters(key)]
        if assign:
            self._adapter_state.refresh()
        return result

    def load_adapter(
        self,
        peft_model_id: str | PathLike[str],
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        allow_pickle: bool = False,
        autocast_adapter_dtype: bool = True,
        use: str | PathLike[str] | None = None,
        values: Mapping[str, Value] | None = None,
    ) -> None:
        """Load an adapter from a directory or the Hub beside the others; it becomes active if none is.

        Everything is checked before anything changes: the config, every key and shape, the base. Raises
        CheckpointError or UsageError. A manifest of another base only warns: the shapes fit, the user may know better.
        float16 and bfloat16 adapters become float32 unless `autocast_adapter_dtype` is False, as in PEFT. `use` is an
        `.adapter` file with methods of your own; what peftc saved needs none, the definition is in the checkpoint.
        `values` are hyperparameters to be other than the file says, such as `{"peft_compatible": True}`.
        """
        state = self._adapter_state
        if adapter_name in state.names():
            fail(
                UsageError, "E511", f"there already is an adapter {adapter_name!r}", help="choose another adapter_name"
            )
        directory = locate(
            peft_model_id if isinstance(peft_model_id, str) else Path(peft_model_id),
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
        )
        config, tensors = read_adapter(directory, allow_pickle=allow_pickle)
        methods = known_methods(config, directory, use)
        facts = read_config(config, methods=methods, adapter_name=adapter_name, where=str(directory))
        for message in facts.warnings:
            warnings.warn(message, stacklevel=2)
        plan, tokens = self._planned(with_values(facts.spec, values or {}), directory)
        if facts.ties:
            check_ties(plan, tied_names(self), str(directory))
        base = dict(base_tensors(self, self._adapter_state.originals))
        shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
        tensors, masks = unpruned(plan, tensors, facts.masks, where=str(directory))
        plan = settled(plan, set(tensors))
        fitted = fit(plan, tensors, where=str(directory), base_shapes=shapes, base_tensors=base.get)
        check_growth(plan, fitted, directory)
        self._check_manifest(directory)
        if tokens is not None:
            self._enlarge(tokens, drawn=False)
        own = base_values(self, state.originals)
        made = initial(plan, own, fitted, upcast=autocast_adapter_dtype)
        adapter = AdapterParameters(plan, made, trained_keys(plan))
        if adapter.allocator is not None:
            adapter.allocator.restore(masks, adapter.tensor)
        adapter.train_only(is_trainable)
        state.add(adapter)
        state.facts.task_type = state.facts.task_type or facts.task_type
        if not state.active:
            state.activate(((adapter_name, 1.0),), trainable=is_trainable)

    def base_fingerprint(self) -> str:
        """A digest of the base's names, shapes and sampled contents, without what is merged or room for new tokens."""
        known = self._adapter_state.facts.fingerprint
        return known or fingerprint(identity(self, self._adapter_state.originals))

    def requires_grad_(self, requires_grad: bool = True) -> "Saving":
        """As torch's, for every parameter. A base that is to be trained gets storage of its own first.

        Raises UsageError where weights are stored packed: they cannot be trained.
        """
        if requires_grad:
            check_trainable(self)
            _unshare(self, None)
        super().requires_grad_(requires_grad)
        return self

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """As transformers': the tensors of an adapter, by default the active one, under the keys PEFT saves."""
        active = self._adapter_state.active
        if adapter_name is None and len(active) != 1:
            fail(UsageError, "E545", f"{len(active)} adapters are active", help="say which with adapter_name")
        return self.adapter_state_dict(adapter_name or active[0][0], state_dict)

    def adapter_state_dict(
        self, adapter_name: str, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """An adapter's tensors under the keys PEFT saves them by."""
        adapter = self._adapter_state.adapter(adapter_name)
        saved = {key: entry for key, entry in entries(adapter.plan).items() if entry.written}
        found = {key: self._value(adapter, entry, state_dict) for key, entry in saved.items()}
        if adapter.allocator is None or not mask_field(adapter.plan.spec.rule):
            return found
        return {key: adapter.allocator.pruned(saved[key].key, value) for key, value in found.items()}

    def _value(
        self, adapter: AdapterParameters, entry: Entry, state_dict: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor:
        if entry.computed:
            at, name = entry.planned, adapter.plan.name
            assert at is not None
            tensors = {each.role: _held(adapter, at.key(name, each), state_dict) for each in at.bound.params}
            return settled_value(at, tensors, base_values(self, self._adapter_state.originals))
        value = _held(adapter, entry.key, state_dict)
        return value if value.shape == entry.shape else value.detach().reshape(entry.shape)

    def _save(
        self,
        adapter: AdapterParameters,
        directory: Path,
        state_dict: Mapping[str, torch.Tensor] | None,
        base_fingerprint: str,
    ) -> None:
        plan, facts = adapter.plan, self._adapter_state.facts
        config = write_config(
            plan,
            module_names=[name for name, _ in self.named_modules() if name and not is_adapters(name)],
            base_model_name_or_path=facts.base_name,
            task_type=facts.task_type or self._task(plan),
            revision=facts.base_revision,
        )
        field, allocator = mask_field(plan.spec.rule), adapter.allocator
        if field and allocator is not None and allocator.masks:
            config[field] = kept_masks(plan, allocator.masks)
        spec = spec_text(plan.spec)
        manifest = Manifest(
            base_id=facts.base_name,
            base_revision=facts.base_revision,
            base_class=type(self).__name__,
            fingerprint=base_fingerprint,
            spec=spec,
            spec_sha256=spec_digest(spec),
            versions=versions(),
            quantized=quantization(self, self._adapter_state.originals),
            adapters={plan.name: AdapterFacts(plan.spec.rule.name, plan.parameter_count)},
        )
        write_adapter(directory, config, self.adapter_state_dict(plan.name, state_dict))
        write_manifest(directory, manifest)

    def _task(self, plan: AdapterPlan) -> str | None:
        """The task that PEFT needs to be told where something stands in front."""
        classes = [each.__name__ for each in type(self).__mro__]
        return fields.task_of(classes) if any(at.bound.prompt is not None for at in plan.sites) else None

    def _planned(self, spec: AdapterSpec, directory: Path) -> tuple[AdapterPlan, int | None]:
        """The plan of a checkpoint's adapter, and the vocabulary it needs if that is more than the model's.

        What is wrong is wrong with the checkpoint, not with a spec.
        """
        backend = self._adapter_state.engine.backend
        vocabulary = backend.vocabulary() if spec.tokens else None
        beyond = set() if vocabulary is None else vocabulary.beyond(spec)
        try:
            plan = backend.plan(spec, tokens=max(beyond) + 1 if beyond else None)
            return plan, needed_vocabulary(plan, vocabulary, str(directory))
        except SpecError as error:
            named = sorted({layout.selector(each) for target in spec.on for each in target.selectors})
            help = f"it was made for modules called {', '.join(named[:8])}; this is a {type(self).__name__}"
            raise CheckpointError(
                *(
                    replace(each, span=None, where=str(directory), help=each.help or (help if named else ""))
                    for each in error.diagnostics
                )
            ) from error

    def _enlarge(self, size: int, *, drawn: bool = True) -> None:
        raise AssertionError("AdaptedModel provides this")

    def _check_manifest(self, directory: Path) -> None:
        manifest = read_manifest(directory)
        if manifest is None:
            return
        state, base_class = self._adapter_state, type(self).__name__
        quantized = quantization(self, state.originals)
        differences = compare(
            manifest,
            self.base_fingerprint(),
            base_class=base_class,
            base_id=state.facts.base_name,
            quantized=quantized,
        )
        for message in differences:
            warnings.warn(message, stacklevel=3)


def versions() -> dict[str, str]:
    """The versions a checkpoint was written with."""
    found = {}
    for package in ("peftc", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _unshare(model: nn.Module, state_dict: Mapping[str, Any] | None) -> None:
    """Give the model tensors of its own where a state dict (None: training) will change what it shares; ties stay."""
    base = [
        (name, each)
        for name, each in model.named_parameters(remove_duplicate=False)
        if not is_adapters(name) and not is_traceable_wrapper_subclass(each)  # packed, and seen to be the same
    ]
    own = {
        id(each): nn.Parameter(each.detach().clone(), requires_grad=each.requires_grad)
        for name, each in base
        if state_dict is None
        or (
            isinstance(given := state_dict.get(name), torch.Tensor)
            and given.shape == each.shape
            and not torch.equal(given.to(each), each)
        )
    }
    for name, each in base:
        if id(each) in own:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = own[id(each)]


def _held(adapter: AdapterParameters, key: ParamKey, state_dict: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    given = (state_dict or {}).get(f"{BANK}.{adapter.plan.name}.{adapter.attribute(key)}")
    return adapter.tensor(key) if given is None else given
