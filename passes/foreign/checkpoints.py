"""What libraries that wrap models, and trainers, leave in the keys of files, and among their tensors."""

import re
from collections.abc import Iterable

# torch.compile, DataParallel and DistributedDataParallel, FSDP, checkpoint_wrapper, Lightning's Fabric.
WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module"}
)

# Heads that trainers put beside a model: what they compute is no output of the model.
HEADS = ("v_head", "value_head")

# Buffers that releases of transformers saved, and that models compute anew, by the ends of their names.
BUFFERS = (
    *("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    *("attn.masked_bias", "attention.masked_bias", "embeddings.position_ids", "embeddings.token_type_ids"),
)

_UNREAD = "_keys_to_ignore_on_load_unexpected"


def unread_keys(models: Iterable[object]) -> tuple[re.Pattern[str], ...]:
    """What transformers leaves out of a file by its name, as these models say."""
    found = (getattr(each, _UNREAD, None) for each in models)
    said = {pattern for each in found if isinstance(each, set | list | tuple) for pattern in each}
    return tuple(map(re.compile, sorted(said)))
