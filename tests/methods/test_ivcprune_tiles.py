"""IVC-Prune's rules for tiles: against plain lists on a layout, and in a model whose images are cut in tiles."""

import pytest
import torch

import vlmprune
from official_cases.anyres import anyres_layout
from support.deeper import deeper
from support.families import llava_next
from vlmprune.layout import raster_layout
from vlmprune.methods import IVCPrune
from vlmprune.methods.layer.ivcprune_image import IVCCounts, choose
from vlmprune.methods.layer.ivcprune_tiles import choose_by_tiles, tile_places
from vlmprune.methods.layer_batch import LayerBatch, ProbedLayer, TextSpans
from vlmprune.methods.shared.rotary_coordinates import rotary_tables, table_means

FAMILY = deeper(llava_next.CASES[0])
SIDE, START, AFTER = 4, 3, 7
# A thumbnail of 4 x 4 and crops side by side, 16 tokens each, those of both crops in rows of 8.
LAYOUT = anyres_layout((1, 2), SIDE, 100, 200, unpad=False, newlines=False)
VARIANTS = {"internvl2.5": ("tile", 0.2), "deepseek-vl2": ("row", 0.3)}


def batch_of(layout, alive, budget, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = START + len(alive) + AFTER
    values = torch.randn(1, width, 2, 16, generator=generator) * 2
    probed = ProbedLayer(
        query=None,
        key=values,
        kinds=None,
        scale=0.25,
        value=values,
        inverse_frequencies=1e4 ** -(torch.arange(0, 16, 2) / 16),
        read_positions=lambda: torch.arange(width)[None],
    )
    after = torch.arange(START + len(alive), width)
    return LayerBatch(
        layer=2,
        counts=(len(alive),),
        budgets=(budget,),
        rows=(0,),
        probed=probed,
        layers=4,
        layouts=(layout,),
        indices=(alive,),
        columns=(torch.arange(len(alive)) + START,),
        text=(TextSpans(torch.arange(START), after, after),),
    )


def best(scores, among, count):
    return sorted(among, key=lambda token: -scores[token])[:count]


def by_lists(batch, variant, share):
    """The rule token by token: thumbnail, what it shows of the crops, position in every tile or row."""
    total = round(share * LAYOUT.total)
    columns, probed = batch.columns[0], batch.probed
    tables = rotary_tables(probed.positions[:, columns], probed.inverse_frequencies)
    means = [table_means(table).tolist() for table in tables]
    size = SIDE * SIDE
    counts = IVCCounts(max(1, round(0.01 * size)), round(0.2 * share * size), 0, round(share * size))
    thumbnail = choose(
        probed.value[0], columns[:size], batch.text[0].after[2:], *(torch.tensor(each[:size]) for each in means), counts
    ).kept.tolist()
    kept = set(thumbnail)
    for token in range(size, LAYOUT.total):
        crop, row, column = (int(each[token]) for each in (LAYOUT.tile - 1, LAYOUT.row, LAYOUT.column))
        # Two crops side by side are as wide as the thumbnail, so a thumbnail's token shows one row and two columns.
        if row * SIDE + (crop * SIDE + column) // 2 in thumbnail:
            kept.add(token)
    by, part = VARIANTS[variant]
    groups = {}
    for token in range(size, LAYOUT.total):
        groups.setdefault(int((LAYOUT.tile if by == "tile" else LAYOUT.row)[token]), []).append(token)
    for members in groups.values():
        for each in means:
            kept.update(best(each, members, round(part * share * len(members))))
    return sorted(kept)[:total], len(kept)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_thumbnail_cells_and_positions(variant, share):
    surplus = 0
    for seed in range(3):
        batch = batch_of(LAYOUT, torch.arange(LAYOUT.total), None, seed)
        expected, wanted = by_lists(batch, variant, share)
        selection = IVCPrune(layer=2, share=share, variant=variant).select_at_layer(batch)
        assert selection.kept.tolist() == expected
        surplus += wanted > selection.counts[0] == round(share * LAYOUT.total)
    assert surplus, "the list was cut"


def test_official_counts_of_a_tile():
    """256 tokens a tile: 26 by cosine and by sine in each, 3 seeds and 128 tokens in the thumbnail."""
    for variant in VARIANTS:
        assert IVCPrune(share=0.5, variant=variant).counts(256) == IVCCounts(3, 26, 128, 128)
    by, part = VARIANTS["deepseek-vl2"]
    assert (by, part * 0.5) == ("row", 0.15)


def test_too_few_are_filled_from_the_thumbnail_first():
    places = tile_places(LAYOUT, torch.arange(LAYOUT.total), "tile")
    batch = batch_of(LAYOUT, torch.arange(LAYOUT.total), None)
    nothing = torch.zeros(LAYOUT.total)

    def of_thumbnail(tokens):
        counts = IVCCounts(1, 0, 0, 2)
        scores = torch.zeros(len(tokens))
        return choose(batch.probed.value[0], batch.columns[0][tokens], batch.text[0].after, scores, scores, counts)

    choice = of_thumbnail(places.thumbnail)
    order = choice.scores.argsort(descending=True, stable=True).tolist()
    shown = {token for token in range(16, 48) if int(places.cell[token]) in choice.kept.tolist()}
    for total in (9, 20):
        kept = choose_by_tiles(places, nothing, nothing, of_thumbnail, 0.0, total).tolist()
        assert len(kept) == total
        assert {*choice.kept.tolist(), *shown} <= set(kept)
        left = total - len(shown)
        if left < 16:
            seeded = [*choice.kept.tolist(), *[token for token in order if token not in choice.kept.tolist()]]
            assert {token for token in kept if token < 16} == set(seeded[:left])
        else:
            assert set(range(16)) <= set(kept)


def test_one_tile_newlines_and_tokens_that_are_gone():
    raster = raster_layout(4, 5)
    batch = batch_of(raster, torch.arange(20), 9)
    plain = IVCPrune(layer=2, keep=0.6).select_at_layer(batch)
    for variant in VARIANTS:
        assert torch.equal(IVCPrune(layer=2, keep=0.6, variant=variant).select_at_layer(batch).kept, plain.kept)
    unpadded = anyres_layout((2, 2), 6, 130, 200)
    for variant, (by, _) in VARIANTS.items():
        places = tile_places(unpadded, torch.arange(unpadded.total), by)
        assert not bool((places.group[unpadded.newline] >= 0).any())
        # Padding is gone, and what is left still spans the whole thumbnail.
        assert set(places.cell[places.group >= 0].tolist()) == set(range(36))
        alive = torch.arange(0, unpadded.total, 3)
        kept = IVCPrune(layer=2, keep=0.6, variant=variant).select_at_layer(batch_of(unpadded, alive, 20)).kept
        assert len(kept.unique()) == 20
        assert tile_places(unpadded, torch.arange(36), by) is None
        assert tile_places(unpadded, torch.arange(36, unpadded.total), by) is None


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_reach_the_layer(variant, monkeypatch):
    model, rows = FAMILY.build(torch.float32), [[3, "A", 4], [2, "B", 2, "small", 6], [9, "large", 5]]
    seen, kept = [], IVCPrune.kept
    monkeypatch.setattr(
        IVCPrune, "kept", lambda self, batch, image: seen.append(batch.layouts[image].total) or kept(self, batch, image)
    )
    chosen = {}
    for name in (variant, "qwen2.5-vl"):
        with vlmprune.pruned(model, IVCPrune(layer=3, share=0.4, variant=name)):
            model(**FAMILY.inputs(rows))
            together = vlmprune.last_run(model).images
            alone = [
                image for row in rows for image in model(**FAMILY.inputs([row])) and vlmprune.last_run(model).images
            ]
        assert seen[: len(together)] == [image.total for image in together]
        seen.clear()
        chosen[name] = [image.kept.tolist() for image in together]
        assert chosen[name] == [image.kept.tolist() for image in alone]
    assert [len(each) for each in chosen[variant]] == [len(each) for each in chosen["qwen2.5-vl"]]
    assert chosen[variant] != chosen["qwen2.5-vl"]
