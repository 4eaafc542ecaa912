"""run: text or tokens generated from an exported artifact. Imports no transformers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

import torch

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.artifact.artifact import Artifact
from peftc.runtime.artifact.decoding import generation_of, most_new_tokens
from peftc.runtime.artifact.sampling import Sampling
from peftc.runtime.artifact.text import TOKENIZER, Stream, Tokenizer

NEW_TOKENS = 20


@dataclass(frozen=True)
class Completion:
    """What followed one prompt. `text` is None where the artifact has no tokenizer; `ended`: by itself."""

    prompt: str | None
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None
    ended: bool


@dataclass(frozen=True)
class RunFacts:
    """A run: what was generated, and how long it took, without loading."""

    artifact: str
    backend: str
    completions: tuple[Completion, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return sum(len(each.ids) for each in self.completions)


def run(
    artifact: Artifact | str | PathLike[str],
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    adapter: str | Sequence[str] | None = None,
    sampling: Sampling | None = None,
    verify: bool = True,
    on_piece: Callable[[int, str], None] | None = None,
) -> RunFacts:
    """Generate from an exported artifact, all prompts in one batch.

    Args:
        artifact: Its directory, or the artifact itself.
        prompts: Texts, or tokens. No chat template is applied.
        max_new_tokens: Stop after so many, or when every row has ended; 20 unless said, as far as the artifact goes.
        adapter: For adapters that are inputs the name of one; for routed ones a name, or one for each prompt.
        sampling: Draw tokens; greedily without.
        verify: Check the digests of the files.
        on_piece: Called with the row and each piece of text as it comes, or of the numbers of tokens where there is no
            tokenizer.

    Raises:
        AdapterError: it is no artifact, cannot generate, or not from this.
    """
    loaded = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact, verify=verify)
    facts = generation_of(loaded.manifest, str(loaded.directory))
    if not prompts:
        fail(UsageError, "E621", "there is no prompt", help="give --prompt TEXT, or --ids 1,2,3")
    has_text = any(isinstance(each, str) for each in prompts) or (loaded.directory / TOKENIZER).exists()
    tokenizer = Tokenizer(loaded.directory) if has_text else None
    rows = [_tokens(tokenizer, each) for each in prompts]
    ids, mask = _padded(rows, facts.pad_token_id or 0, left=not facts.encoder_decoder)
    loaded.prepare()
    if max_new_tokens is None:
        most = most_new_tokens(loaded.manifest, 1 if facts.encoder_decoder else ids.shape[1])
        max_new_tokens = NEW_TOKENS if most is None else max(1, min(NEW_TOKENS, most))
    before: list[tuple[int, ...]] = [() if facts.encoder_decoder else each for each in rows]
    streams = [Stream(tokenizer, each) if tokenizer else None for each in before]
    new: list[list[int]] = [[] for _ in rows]
    texts = [""] * len(rows)
    ended = [False] * len(rows)

    def say(row: int, piece: str) -> None:
        texts[row] += piece
        if on_piece is not None and piece:
            on_piece(row, piece)

    start = time.perf_counter()
    for step in loaded.stream(ids, mask, max_new_tokens=max_new_tokens, adapter=adapter, sampling=sampling):
        for row, token in enumerate(step.tolist()):
            if ended[row]:
                continue
            stream = streams[row]
            say(row, stream.add(token) if stream is not None else f"{',' if new[row] else ''}{token}")
            new[row].append(token)
            ended[row] = token in facts.eos_token_id
    seconds = time.perf_counter() - start
    for row, stream in enumerate(streams):
        if stream is not None:
            say(row, stream.rest())
    completions = tuple(
        Completion(
            prompt if isinstance(prompt, str) else None,
            rows[row],
            tuple(new[row]),
            texts[row] if tokenizer is not None else None,
            ended[row],
        )
        for row, prompt in enumerate(prompts)
    )
    return RunFacts(str(loaded.directory), loaded.manifest.backend, completions, seconds)


def _tokens(tokenizer: Tokenizer | None, prompt: str | Sequence[int]) -> tuple[int, ...]:
    ids = tokenizer.encode(prompt) if tokenizer is not None and isinstance(prompt, str) else prompt
    if not ids:
        fail(UsageError, "E621", f"the prompt {prompt!r} has no tokens", help="give one that is not empty")
    return tuple(int(each) for each in ids)


def _padded(rows: Sequence[Sequence[int]], padding: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as one tensor, and its mask. A decoder goes on from the last token, so its padding is in front."""
    width = max(len(each) for each in rows)
    ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(rows):
        place = slice(width - len(each), width) if left else slice(0, len(each))
        ids[row, place] = torch.tensor(each, dtype=torch.int64)
        mask[row, place] = 1
    return ids, mask
