"""What an input is for, whatever a library calls it. Needs no torch."""

from enum import StrEnum


class Role(StrEnum):
    """What an input is for."""

    TOKENS = "tokens"
    EMBEDDINGS = "embeddings"  # of tokens, in their place
    MASK = "mask"  # which places of a text are seen, or which place sees which
    POSITIONS = "positions"
    TYPES = "types"  # of tokens
    IDS = "ids"  # any other number for each token
    PLACES = "places"  # of the tokens in a cache, for all rows alike
    LABELS = "labels"
    BOUNDS = "bounds"  # of an answer: places in the text
    CACHE = "cache"  # keys or values of one layer
    CARRIED = "carried"  # keys or values that virtual tokens left in a cache
    ENCODED = "encoded"  # what an encoder made
    OTHER_MASK = "other mask"
    SIGNAL = "signal"  # samples of a sound
    TASKS = "tasks"  # a number for each row
    ADAPTERS = "adapters"  # which one, a number for each row
    OTHER = "other"


class Stack(StrEnum):
    """Whose text an input belongs to: a model's that has one stack of layers, or of two the encoder's or decoder's."""

    ONLY = "only"
    ENCODER = "encoder"
    DECODER = "decoder"
