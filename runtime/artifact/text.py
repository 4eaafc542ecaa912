"""Text and tokens, by the tokenizer that lies in an artifact."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftc.grammar.diagnostics import CheckpointError, UsageError, fail
from peftc.runtime.artifact.programs import package

TOKENIZER = "tokenizer.json"
_CUT = "�"  # what a text ends in whose last character is not complete yet


class Tokenizer:
    """The tokenizer of an artifact. Applies no chat template."""

    def __init__(self, directory: Path):
        """Read it.

        Raises:
            UsageError: there is none (E624), or tokenizers is not installed (E607).
            CheckpointError: it cannot be read (E606).
        """
        path = directory / TOKENIZER
        if not path.exists():
            help = "give the numbers of the tokens instead: --ids 1,2,3"
            fail(
                UsageError,
                "E624",
                f"the artifact has no {TOKENIZER}, so it takes no text",
                help=help,
                where=str(directory),
            )
        library = package("tokenizers", "tokenizers", "read text", where=str(path))
        try:
            self._tokenizer: Any = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other
            fail(CheckpointError, "E606", f"this cannot be loaded as a tokenizer: {error}", where=str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the model wants around it."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Stream:
    """The text of tokens that come one after the other: what each adds, once its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        # A few tokens of the prompt tell whether the first new one begins with a space.
        self._tokenizer, self._ids = tokenizer, list(before[-4:])
        self._start, self._end = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that is complete now and was not before."""
        self._ids.append(token)
        text = self._new()
        if text.endswith(_CUT):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def rest(self) -> str:
        """What is left at the end, complete or not."""
        return self._new()

    def _new(self) -> str:
        known = self._tokenizer.decode(self._ids[self._start : self._end])
        return self._tokenizer.decode(self._ids[self._start :])[len(known) :]
