from dataclasses import replace

from peftc.passes.plan.by_row import by_row
from peftc.passes.plan.structure import copy_slot, rows_slot, site_slot, structure_of

LOW = "adapter a = lora(rank = 2) { on first, second }"
WIDE = "adapter a = lora(rank = 4, alpha = 3) { on first }"
SCALED = "adapter a = ia3 { on second }"


def structures(lab, *specs, model="Two"):
    return [lab.active(model, each).structure for each in specs]


def test_adapters_of_equal_terms_share_a_lane(lab):
    found = by_row(structures(lab, LOW, WIDE, SCALED))
    first, second = found.structure.sites
    assert (first.site.name, first.lanes, second.lanes) == ("first", (1,), (1, 1))
    assert [[term.position for term in lane] for lane in second.by_lane()] == [[0], [1]]
    assert found.owners == (
        {site_slot(0, "first"): site_slot(0, "first"), site_slot(0, "second"): site_slot(0, "second")},
        {site_slot(0, "first"): site_slot(0, "first")},
        {site_slot(1, "second"): site_slot(0, "second")},
    )


def test_several_at_once_are_a_lane_of_their_own(lab):
    one = lab.active("Two", LOW)
    both = lab.active("Two", LOW, WIDE.replace("adapter a", "adapter b"))
    found = by_row([one.structure, both.structure])
    assert found.structure.sites[0].lanes == (1, 2)
    assert found.owners[1] == {
        site_slot(1, "first"): site_slot(0, "first"),
        site_slot(2, "first"): site_slot(1, "first"),
        site_slot(0, "second"): site_slot(0, "second"),
    }


def test_the_order_of_choices_decides_nothing_but_the_lanes(lab):
    low, wide, _ = structures(lab, LOW, WIDE, SCALED)
    assert by_row([low, wide]).structure == by_row([low]).structure
    assert by_row([wide, low]).structure.sites[0] == by_row([low, wide]).structure.sites[0]


def test_copies_and_trained_tokens_have_one_slot_a_tensor(lab):
    tokens = "adapter a = trainable_tokens { tokens [5, 2] in embed }"
    copied = "adapter a = lora(rank = 2) { on conv  train bag }"
    later = structure_of([], ())
    one, two = structures(lab, tokens, copied, model="Lookup")
    moved = replace(two, copies=tuple(replace(each, position=1) for each in two.copies))
    found = by_row([one, moved, later])
    assert [(each.position, each.target) for each in found.structure.copies] == [(0, "bag.table")]
    assert [(each.position, each.source) for each in found.structure.rows] == [(0, "embed")]
    assert found.owners[0] == {rows_slot(0, "embed"): rows_slot(0, "embed")}
    assert found.owners[1][copy_slot(0, "bag")] == copy_slot(1, "bag")
    assert found.owners[2] == {}
