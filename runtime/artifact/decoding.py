"""Generation from the entries `prefill` and `decode`: the tokens that transformers' `generate` gives."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign.transformers import LOGITS, Argument, argument_of, name_of
from peftc.passes.ir.roles import Role, Stack
from peftc.runtime.artifact.checks import dtype_of
from peftc.runtime.artifact.manifest import ArtifactManifest, Entry, Generation, TensorFacts
from peftc.runtime.artifact.programs import Value
from peftc.runtime.artifact.sampling import Sampling

Call = Callable[[str, Mapping[str, Value]], dict[str, Tensor]]


@dataclass(frozen=True)
class Prompt:
    """What to go on from: ids and mask, both [batch, tokens]; what else every call takes, such as adapters."""

    ids: Tensor
    mask: Tensor
    beside: Mapping[str, Value]


def generation_of(manifest: ArtifactManifest, where: str) -> Generation:
    """What the manifest says about generating. Raises UsageError where the artifact cannot (E620)."""
    if manifest.generation is None:
        entries = ", ".join(f"'{each}'" for each in manifest.entries)
        inputs = ", ".join(each.name for each in next(iter(manifest.entries.values())).inputs)
        help = f"it computes outputs from {inputs}: call it from Python with Artifact.load"
        fail(UsageError, "E620", f"the artifact does not generate: it has only {entries}", help=help, where=where)
    return manifest.generation


def read_prompt(manifest: ArtifactManifest, ids: Tensor, mask: Tensor | None, beside: Mapping[str, Value]) -> Prompt:
    """Check the tokens of a prompt. Without a mask, every token counts that is not the one for padding.

    Raises:
        UsageError: they are no tokens of the model (E621), or a row is empty or ends in padding.
    """
    facts = generation_of(manifest, name_of(Role.TOKENS))
    if ids.dim() != 2 or ids.dtype != torch.int64 or 0 in ids.shape:
        found = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        _wrong(f"the tokens of a prompt are int64 [batch, tokens], and at least one; this is {found}")
    size = _vocabulary(manifest)
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        found = f"{int(ids.min())} to {int(ids.max())}"
        _wrong(f"the model has tokens 0 to {size - 1}; those of the prompt are {found}")
    if mask is None:
        padding = facts.pad_token_id if facts.pad_token_id not in facts.eos_token_id else None
        mask = torch.ones_like(ids) if padding is None or not (ids == padding).any() else (ids != padding).long()
    mask = mask.long()
    if mask.shape != ids.shape:
        _wrong(f"the mask has shape {list(mask.shape)}, the tokens have {list(ids.shape)}")
    empty = (mask.sum(-1) == 0).nonzero().flatten().tolist()
    if empty:
        _wrong(f"row {empty[0]} of the prompt is only padding")
    ended = (mask[:, -1] == 0).nonzero().flatten().tolist()
    if ended and not facts.encoder_decoder:
        _wrong(f"row {ended[0]} of the prompt ends in padding", "pad on the left: the next token follows the last one")
    return Prompt(ids, mask, beside)


def decode(
    call: Call,
    manifest: ArtifactManifest,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    eos: tuple[int, ...],
    sampling: Sampling | None,
) -> Iterator[Tensor]:
    """The next tokens [batch], step by step, until every row has ended or there are enough.

    Raises:
        UsageError: the text would become longer than the artifact was made for (E622).
    """
    facts = generation_of(manifest, name_of(Role.TOKENS))
    rows = len(prompt.ids)
    fed = torch.full((rows, 1), facts.decoder_start_token_id or 0) if facts.encoder_decoder else prompt.ids
    _check_length(manifest, fed.shape[1], max_new_tokens, facts.encoder_decoder)
    return _steps(call, manifest, facts, prompt, fed, max_new_tokens, eos, sampling)


def _steps(
    call: Call,
    manifest: ArtifactManifest,
    facts: Generation,
    prompt: Prompt,
    fed: Tensor,
    max_new_tokens: int,
    eos: tuple[int, ...],
    sampling: Sampling | None,
) -> Iterator[Tensor]:
    first, later = manifest.entries["prefill"], manifest.entries["decode"]
    rows, width = prompt.ids.shape
    grown = torch.cat([prompt.mask, prompt.mask.new_ones(rows, max_new_tokens)], dim=1)
    positions = (prompt.mask.cumsum(-1) - 1).clamp(min=0)
    state: dict[str, Value] = _empty(first, rows)
    padding = facts.pad_token_id if facts.pad_token_id is not None else (eos[0] if eos else 0)
    going = torch.ones(rows, dtype=torch.bool)
    ends = torch.tensor(eos, dtype=torch.int64)
    entry, filled = first, width
    for _ in range(max_new_tokens):
        meant = _meant(prompt, fed, grown[:, :filled], positions, facts.encoder_decoder)
        known: dict[str, Value | None] = {
            given.name: meant.get(argument_of(given.name, facts.encoder_decoder)) for given in entry.inputs
        }
        known |= {**prompt.beside, **state}
        outputs = call(entry.name, {given.name: _known(given.name, known, entry) for given in entry.inputs})
        state |= {past: outputs[present] for present, past in entry.state.items()}
        logits = outputs[LOGITS][:, -1]
        chosen = logits.argmax(-1) if sampling is None else sampling.draw(logits)
        chosen = torch.where(going, chosen, padding)
        yield chosen
        if eos:
            going = going & ~torch.isin(chosen, ends)
            if not going.any():
                return
        fed, positions, entry, filled = chosen[:, None], positions[:, -1:] + 1, later, filled + 1


def _meant(
    prompt: Prompt, fed: Tensor, mask: Tensor, positions: Tensor, encoder_decoder: bool
) -> dict[Argument, Tensor]:
    """What a call is given, by what it is for: of a model with two stacks the text is the encoder's."""
    if not encoder_decoder:
        return {Argument(Role.TOKENS): fed, Argument(Role.MASK): mask, Argument(Role.POSITIONS): positions}
    return {
        Argument(Role.TOKENS, Stack.ENCODER): prompt.ids,
        Argument(Role.MASK, Stack.ENCODER): prompt.mask,
        Argument(Role.TOKENS, Stack.DECODER): fed,
    }


def most_new_tokens(manifest: ArtifactManifest, tokens: int) -> int | None:
    """How many tokens can follow so many; None where nothing limits it."""
    limits = []
    if manifest.length is not None:
        limits.append(manifest.length - tokens + 1)  # the last one is never fed
    past = manifest.dimensions.get("past")
    if past is not None and past.max is not None:
        limits.append(past.max - tokens + 2)
    return min(limits) if limits else None


def _check_length(manifest: ArtifactManifest, tokens: int, wanted: int, encoder_decoder: bool) -> None:
    most = most_new_tokens(manifest, tokens)
    if most is None or wanted <= most:
        return
    what = "the text begins" if encoder_decoder else "the prompt"
    message = f"{what} has {tokens} tokens and {wanted} are to follow: longer than the artifact was made for"
    help = f"at most {most} can follow" if most > 0 else "shorten the prompt, or export for a longer sequence"
    fail(UsageError, "E622", message, help=help)


def _known(name: str, known: Mapping[str, Value | None], entry: Entry) -> Value:
    value = known.get(name)
    if value is None:
        message = f"the entry '{entry.name}' takes '{name}', which generating from tokens does not give"
        fail(UsageError, "E620", message, help="call the entries from Python with Artifact.load")
    return value


def _empty(entry: Entry, rows: int) -> dict[str, Value]:
    """Caches of length 0, where the first call takes some: it is the same program as the later ones then."""
    sizes = {"batch": rows, "past": 0}
    caches = [
        each
        for each in entry.inputs
        if isinstance(each, TensorFacts)
        and any(size.dimensions == ("past",) for size in each.shape)
        and all(name in sizes for size in each.shape for name in size.dimensions)
    ]
    return {each.name: torch.zeros([size.value(sizes) for size in each.shape], dtype=dtype_of(each)) for each in caches}


def _vocabulary(manifest: ArtifactManifest) -> int:
    logits = next(each for each in manifest.entries["prefill"].outputs if each.name == LOGITS)
    return logits.shape[-1].number


def _wrong(message: str, help: str = "") -> None:
    fail(UsageError, "E621", message, help=help)
