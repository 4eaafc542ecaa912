"""However the keys of a file are spelled, they come to those that are expected; and only those."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from peftc.passes.foreign.checkpoints import WRAPPERS
from peftc.runtime.peft_format.key_spelling import PREFIX, SHARED, spelling

NAMES = ("q_proj", "layers", "0", "model", "base_model", "default", "module", "_orig_mod", "weight", "lora_A")
TAILS = ("lora_A.weight", "lora_B.weight", "lora_E", "peanut_encoders.3.weight")

WORDS = {*WRAPPERS, "base_model"}

paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(".".join)
adapter_names = st.sampled_from(("default", "module", "support", "weight", "0", "lora_A"))


def modules_of(sites):
    """The sites and what they are in."""
    return {".".join(parts[:end]) for parts in (each.split(".") for each in sites) for end in range(1, len(parts) + 1)}


def expected_of(sites, tails):
    return {f"{PREFIX}{site}.{tail}": tail for site in sites for tail in tails}


@st.composite
def files(draw):
    """A model's sites, the keys that are expected of a file, and other spellings of them, all done alike."""
    sites = draw(st.lists(paths, min_size=1, max_size=4, unique=True))
    tails = draw(st.lists(st.sampled_from(TAILS), min_size=1, max_size=3, unique=True))
    modules, expected = modules_of(sites), expected_of(sites, tails)
    prefix = draw(st.sampled_from((PREFIX, PREFIX * 2, "")))
    outside = draw(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=2))
    name = draw(st.none() | adapter_names)
    inside = draw(st.sampled_from(sorted(modules)))
    wrapper = draw(st.none() | st.sampled_from(sorted(WRAPPERS)))

    def other(site, tail):
        parts = site.split(".")
        if wrapper is not None and f"{site}.".startswith(f"{inside}."):
            parts.insert(inside.count(".") + 1, wrapper)
        first, *rest = tail.split(".")
        named = [first, *([] if name is None else [name]), *rest]
        return ".".join((*outside, *prefix.split(".")[:-1], *parts, *named))

    return modules, expected, {other(site, tail): f"{PREFIX}{site}.{tail}" for site in sites for tail in tails}


@given(files())
def test_every_spelling_is_understood_or_refused(found):
    """A name that the model has itself is no wrapper's, so that a file whose wrappers are called so may not be
    understood; but then it lacks keys, or has one twice, and none of this is taken in silence.
    """
    modules, expected, keys = found
    names = spelling(keys, expected, modules).names
    read = {key: names.get(key, key) for key in keys}
    if sorted(read.values()) == sorted(expected) or not {name.split(".")[-1] for name in modules} & WORDS:
        assert read == keys


@given(files())
def test_what_is_expected_stays(found):
    modules, expected, _ = found
    assert spelling(expected, expected, modules).names == {}


def one(key, expected=("a.q.lora_A.weight",), modules=("a", "a.q"), tails=("lora_A.weight",)):
    wanted = {PREFIX + each: next((tail for tail in tails if each.endswith(tail)), "") for each in expected}
    return spelling([key], wanted, set(modules)).names.get(key, key)


def test_modules_that_are_called_like_wrappers():
    own = {"modules": ("module", "module.q", "default", "default.q"), "tails": ("lora_A.weight", "lora_E")}
    wanted = ("module.q.lora_A.weight", "default.q.lora_E")
    assert one("module.q.lora_A.weight", wanted, **own) == f"{PREFIX}module.q.lora_A.weight"
    assert one("module.module.q.lora_A.default.weight", wanted, **own) == f"{PREFIX}module.q.lora_A.weight"
    assert one(f"{PREFIX}default.q.lora_E.default", wanted, **own) == f"{PREFIX}default.q.lora_E"


def test_one_that_is_not_adapted_is_not_taken_for_one_that_is():
    modules = ("a", "a.q", "a.module", "a.module.q")
    assert one("a.module.q.lora_A.weight", modules=modules) == f"{PREFIX}a.module.q.lora_A.weight"
    assert one("a.q.module.lora_A.weight", modules=modules) == f"{PREFIX}a.q.lora_A.weight"


def test_where_the_name_of_an_adapter_may_stand():
    bare = {"expected": ("a.q.lora_magnitude_vector",), "tails": ("lora_magnitude_vector",)}
    wanted = f"{PREFIX}a.q.lora_magnitude_vector"
    assert one("a.q.lora_magnitude_vector.mine", **bare) == wanted
    assert one("a.q.lora_magnitude_vector.mine.weight", **bare) == wanted
    assert one("a.q.lora_A.b.c.weight") == f"{PREFIX}a.q.lora_A.b.c.weight"
    assert one("a.q.mine.lora_A.weight") == f"{PREFIX}a.q.mine.lora_A.weight"


def test_tensors_that_belong_to_no_module():
    found = spelling(["module.base_model.vera_A.default"], {f"{SHARED}vera_A": "vera_A"}, set())
    assert found.names == {"module.base_model.vera_A.default": f"{SHARED}vera_A"}
    assert spelling(["module.prompt_embeddings"], {"prompt_embeddings": "prompt_embeddings"}, set()).names == {
        "module.prompt_embeddings": "prompt_embeddings"
    }


def test_copies_of_trained_modules():
    expected = {f"{PREFIX}score.weight": ""}
    copy = f"{PREFIX}score.modules_to_save.default.weight"
    assert spelling([copy], expected, {"score"}).names == {copy: f"{PREFIX}score.weight"}
    assert spelling([copy, f"{PREFIX}score.weight"], expected, {"score"}).names == {}
    assert spelling([copy, "score.weight"], expected, {"score"}).names == {"score.weight": f"{PREFIX}score.weight"}


def test_two_spellings_of_one_keep_apart():
    tensors = {"module.a.q.lora_A.weight": torch.zeros(1), "a.q.lora_A.x.weight": torch.ones(1)}
    found = spelling(tensors, {f"{PREFIX}a.q.lora_A.weight": "lora_A.weight"}, {"a", "a.q"})
    assert set(found.applied(tensors)) == {f"{PREFIX}a.q.lora_A.weight", "a.q.lora_A.x.weight"}
    assert set(found.names.values()) == {f"{PREFIX}a.q.lora_A.weight"}
    assert found.told(f"{PREFIX}a.q.lora_A.weight") == "module.a.q.lora_A.weight"
