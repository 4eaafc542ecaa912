"""Uploading saved adapters to the Hub."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi


@dataclass(frozen=True)
class PushOptions:
    """Where to, and how it is told: the arguments of `push_to_hub` in transformers."""

    repo_id: str
    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: bool | str | None = None
    revision: str | None = None
    create_pr: bool = False
    tags: Sequence[str] = ()


def push(model: Any, options: PushOptions, **saved: Any) -> CommitInfo:
    """Save into a directory of its own, and upload that. `saved` are arguments of `save_pretrained`."""
    api = HfApi(token=options.token)
    found = api.create_repo(options.repo_id, private=options.private, exist_ok=True)
    if options.revision is not None and not options.revision.startswith("refs/pr"):
        api.create_branch(found.repo_id, branch=options.revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, **saved)
        if options.tags:
            model.create_or_update_model_card(directory, tags=options.tags)
        return api.upload_folder(
            repo_id=found.repo_id,
            folder_path=Path(directory),
            commit_message=options.commit_message or "Upload adapter",
            commit_description=options.commit_description,
            revision=options.revision,
            create_pr=options.create_pr,
        )
