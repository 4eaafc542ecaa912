"""An adapted model that can be saved, and sent to the Hub."""

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo

from peftc.grammar.diagnostics import ArgumentTypeError, UsageError, did_you_mean, fail
from peftc.passes.foreign import transformers as contract
from peftc.runtime.model.embeddings import SaveEmbeddings
from peftc.runtime.model.inspected_model import InspectedModel
from peftc.runtime.model.publishing import PushOptions, push, write_card
from peftc.runtime.model.saving import adapter_tensors, save_adapters


class SavedModel(InspectedModel):
    """An adapted model that writes its adapters in PEFT's format, and uploads them."""

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write adapters, not the base, in the format `peft` and transformers load, and a model card.

        As PEFT does, the adapter called `default` (or a lone one, but not of `peftc.peft`) goes into the directory
        itself and every other into a subdirectory of its name. A manifest with the spec and the base's fingerprint lies
        beside each. Values come from `state_dict` (of this model) if one is given. In a Trainer's checkpoint (a
        directory called `checkpoint-<step>`) the adapters' part of the state dict is saved too where PEFT is not
        installed, from which the Trainer then resumes. What transformers and accelerate give beside these
        (`save_function`, `max_shard_size`, `token`) changes nothing: an adapter is one small file, written by this
        process.

        With `safe_serialization=False` the tensors are pickled, into `adapter_model.bin`. README.md is made where there
        is none; of one that is there only the metadata changes.

        With `save_embedding_layers` the base's token embeddings and output head are saved beside an adapter, and those
        that it was loaded with, which take the place of the model's wherever it is loaded. "auto" has them saved, as in
        PEFT, if the adapter is on them, or if the model has other tokens than where it was loaded from and the adapter
        has not trained them all one by one; and always those that it was loaded with.

        Raises UsageError for unknown adapters and `push_to_hub`, ArgumentTypeError for an unknown argument, and
        CheckpointError if a file cannot be written; files appear whole or not at all.
        """
        if kwargs.pop("push_to_hub", False):
            fail(UsageError, "E542", "save_pretrained does not upload", help="call push_to_hub")
        for name in kwargs.keys() - contract.SAVING:
            known = inspect.signature(self.save_pretrained).parameters
            help = did_you_mean(name, known) or f"known are {', '.join(each for each in known if each != 'kwargs')}"
            fail(ArgumentTypeError, "E589", f"save_pretrained has no argument {name!r}", help=help)
        if is_main_process:
            names = self._adapter_state.names() if selected_adapters is None else selected_adapters
            save_adapters(self, save_directory, names, state_dict, save_embedding_layers, safe=safe_serialization)
            write_card(self, Path(save_directory), names)

    def create_or_update_model_card(
        self,
        output_dir: str | PathLike[str],
        *,
        metrics: Mapping[str, object] | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """Write README.md: the base, the methods, what they adapt, and metadata that the Hub reads.

        Of a card that is there the text stays, and the library, the base, the tags (`tags` beside the usual) and the
        pipeline, if none is said, are brought up to date; one whose metadata cannot be read is left alone, with a
        warning. `metrics` are results to be listed in a new card. Raises CheckpointError if it cannot be written.
        """
        write_card(self, Path(output_dir), self._adapter_state.names(), metrics=metrics, tags=tags)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes to a repository on the Hub, which is made if there is none.

        Returns the commit, whose text is its address. Raises as `save_pretrained`, and what huggingface_hub raises.
        """
        options = PushOptions(
            repo_id=repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tuple(tags),
        )
        return push(self, options, safe_serialization=safe_serialization, selected_adapters=selected_adapters)

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
        return adapter_tensors(self, adapter_name, state_dict)
