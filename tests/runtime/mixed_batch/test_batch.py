from types import SimpleNamespace

import torch

from peftc.runtime.mixed_batch.batch import Assigned, Chosen, MixedBatch


def chosen(*tensors):
    held = dict(enumerate(tensors))
    adapter = SimpleNamespace(items=lambda: held.items(), held=lambda key: (held, key))
    return Chosen([(adapter, 1.0)], None), held


def assigned(batch, *names, repeats=frozenset()):
    batch.assigned = Assigned(names, repeats)
    return batch


def test_layout_changes_with_the_rows_only():
    (one, _), (two, _) = chosen(torch.ones(2)), chosen(torch.ones(2))
    batch = assigned(MixedBatch(), one, None, two)
    first = batch.layout
    assert assigned(batch, one, None, two).layout is first
    assert assigned(batch, two, None, one).layout is not first
    assert batch.present == (two, None, one)


def test_contents_change_with_what_is_written_or_replaced():
    one, held = chosen(torch.ones(2), torch.ones(3))
    batch = assigned(MixedBatch(), one, None)
    batch.look()
    before = batch.contents
    batch.look()
    assert batch.contents is before
    held[0].add_(1)
    batch.look()
    written = batch.contents
    assert written is not before
    held[1] = torch.ones(3)
    batch.look()
    assert batch.contents is not written


def test_what_was_made_in_inference_mode_is_always_looked_at_anew():
    with torch.inference_mode():
        one, _ = chosen(torch.ones(2))
    batch = assigned(MixedBatch(), one)
    batch.look()
    before = batch.contents
    batch.look()
    assert batch.contents is not before


def test_gradients_are_those_of_what_is_present():
    one, _ = chosen(torch.ones(2, requires_grad=True))
    two, held = chosen(torch.ones(2))
    assert assigned(MixedBatch(), one, two).trains
    batch = assigned(MixedBatch(), two, None)
    assert not batch.trains
    held[0].requires_grad_(True)
    batch.look()
    assert batch.trains
    assert assigned(batch, one).trains


def test_rows_stretch_only_where_they_may():
    one, _ = chosen(torch.ones(2))
    batch = assigned(MixedBatch(), one, None)
    assert batch.fits(2)
    assert not batch.fits(4)
    assigned(batch, one, None, repeats=frozenset({1, 2}))
    assert not batch.fits(3)
    assert batch.fits(4)
    assert batch.rows == (one, one, None, None)
    assert batch.fits(2)
    assert not batch.fits(0)


def test_rows_of_an_earlier_call_come_back_for_a_while():
    one, _ = chosen(torch.ones(2))
    batch = assigned(MixedBatch(), one, None)
    with batch.having((None, one)):
        assert batch.rows == (None, one)
    assert batch.rows == (one, None)
