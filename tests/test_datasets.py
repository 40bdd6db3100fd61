"""Crops and tiles of periodic boxes; the order of samples; the cache."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_grids import filled, make_grids, small_disk

from galdist.data.datasets import (
    Box,
    BoxCache,
    CropDataset,
    CropIndex,
    CropSampler,
    CropsConfig,
    GridData,
    periodic_crop,
    tiles,
)
from galdist.data.transforms import N_SYMMETRIES, cube_symmetry
from galdist.grids.store import StoreError
from hpc import ddp, durable

ALONE = ddp.Group(0, 1, 0, torch.device("cpu"))


@settings(deadline=None)
@given(
    n_mesh=st.integers(1, 7),
    origin=st.tuples(*[st.integers(-20, 20)] * 3),
    shape=st.tuples(*[st.integers(1, 16)] * 3),
)
def test_periodic_crop_is_the_mesh_with_indices_modulo_its_size(
    n_mesh: int, origin: tuple, shape: tuple
) -> None:
    mesh = np.random.default_rng(0).normal(size=(2, n_mesh, n_mesh, n_mesh)).astype(np.float32)
    index = [np.arange(start, start + size) % n_mesh for start, size in zip(origin, shape, strict=True)]
    assert np.array_equal(periodic_crop(mesh, origin, shape), mesh[:, *np.ix_(*index)])
    assert np.array_equal(periodic_crop(mesh[0], origin, shape), mesh[:1, *np.ix_(*index)])


@given(
    cells=st.integers(1, 12),
    side=st.integers(1, 6),
    halo=st.integers(0, 9),
    alignment=st.sampled_from([1, 2, 4]),
)
def test_tiles_cover_every_voxel_once(cells: int, side: int, halo: int, alignment: int) -> None:
    n_mesh = cells * alignment
    blocks = tiles(n_mesh, side * alignment, halo, alignment)
    covered = np.zeros((n_mesh,) * 3, int)
    mesh = np.arange(n_mesh**3, dtype=np.float32).reshape((n_mesh,) * 3)
    for tile in blocks:
        covered[tile.interior] += 1
        assert tile.periodic == (len(blocks) == 1)
        assert all(start % alignment == 0 for start in (*tile.origin, tile.halo))
        assert tile.periodic or tile.halo >= halo
        values = tile.batch({"matter": mesh})["matter"][0, 0].numpy()
        inside = slice(tile.halo, -tile.halo or None)
        assert np.array_equal(values[inside, inside, inside], mesh[tile.interior])
    assert np.all(covered == 1)


def test_tiles_off_the_pooling_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        tiles(32, 6, 0, 4)
    with pytest.raises(ValueError, match="n_mesh is 30"):
        tiles(30, 4, 0, 4)


def sampler(
    rank: int = 0, world_size: int = 1, parts: int = 1, window: int = 3, **more: object
) -> CropSampler:
    return CropSampler(7, 6, window, 8, parts, rank, world_size, seed=1, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_ranks_share_the_batches_of_one_rank(world_size: int, parts: int) -> None:
    alone = list(sampler())
    shares = [list(sampler(rank, world_size, parts)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        shared = [index for part in range(parts) for share in shares for index in share[step * parts + part]]
        assert shared == batch


def test_an_epoch_takes_every_crop_of_every_box_and_the_next_one_in_another_order() -> None:
    each = sampler()
    first, _ = each.order()
    assert np.array_equal(np.bincount(first), np.full(7, 6))
    each.start_at(1, 0)
    assert not np.array_equal(each.order()[0], first)


def test_a_resumed_epoch_goes_on_where_it_was() -> None:
    each = sampler(parts=2)
    whole = list(each)
    each.start_at(0, 3)
    assert len(each) == len(whole) - 6
    assert list(each) == whole[6:]


def test_windows_tell_which_boxes_are_needed() -> None:
    needed: list[int] = []
    each = sampler(on_window=lambda boxes: needed.__setitem__(slice(None), boxes))
    sizes = set()
    for batch in each:
        assert {index.box for index in batch} <= set(needed)
        sizes.add(len(needed))
    assert max(sizes) <= 2 * each.window < each.n_boxes


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    make_grids(tmp_path / "grids")
    return tmp_path / "grids"


def test_a_sample_is_a_turned_crop_that_its_index_alone_decides(grids: Path, tmp_path: Path) -> None:
    boxes = [Box(str(grids / "grids.zarr"), "box_0"), Box(str(grids / "grids.zarr"), "box_1")]
    fields = ["matter_counts", "galaxy_counts", "momentum"]
    samples = []
    for who in ("one", "two"):
        dataset = CropDataset(BoxCache(tmp_path / who, boxes, 2), fields, 6, 16, seed=5)
        order = range(20) if who == "one" else reversed(range(20))
        samples.append({i: dataset[CropIndex(2, i, i % 2)] for i in order})
    for i in range(20):
        for field in fields:
            assert np.array_equal(samples[0][i][field], samples[1][i][field])
    # the fields of a sample belong together, and are a crop of the box under some symmetry
    box = boxes[1].open()
    sample = samples[0][3]
    matter, galaxies, momentum = (box.read(field) for field in fields)
    found = [
        (origin, s)
        for origin in np.ndindex(16, 16, 16)
        for s in range(N_SYMMETRIES)
        if matter[origin]
        in sample["matter_counts"][0, [0, 0, 0, 0, -1, -1, -1, -1], [0, 0, -1, -1] * 2, [0, -1] * 4]
        and np.array_equal(cube_symmetry(periodic_crop(matter, origin, (6,) * 3), s), sample["matter_counts"])
    ]
    assert len(found) == 1
    ((origin, s),) = found
    for field, mesh in (("galaxy_counts", galaxies), ("momentum", momentum)):
        assert np.array_equal(cube_symmetry(periodic_crop(mesh, origin, (6,) * 3), s), sample[field])


def test_crops_are_everywhere_and_under_every_symmetry(grids: Path, tmp_path: Path) -> None:
    mesh = np.arange(16**3, dtype=np.float32).reshape((16,) * 3)
    boxes = [Box(str(grids / "grids.zarr"), "box_0")]
    cache = BoxCache(tmp_path / "cache", boxes, 1)
    cache._open[0, "place"] = mesh
    dataset = CropDataset(cache, ["place"], 2, 16, seed=0)
    crops = [dataset[CropIndex(0, i, 0)]["place"][0] for i in range(3000)]
    corners = np.bincount([int(crop[0, 0, 0]) // 256 for crop in crops], minlength=16)
    assert corners.min() > 0.6 * 3000 / 16
    differences = {(crop[1, 0, 0] - crop[0, 0, 0], crop[0, 1, 0] - crop[0, 0, 0]) for crop in crops}
    assert {(a, b) for a in (1, 16, 256) for b in (1, 16, 256) if a != b} <= differences


def test_cache_decodes_once_and_forgets_what_is_not_kept(grids: Path, tmp_path: Path) -> None:
    boxes = [Box(str(grids / "grids.zarr"), f"box_{n}") for n in range(4)]
    cache = BoxCache(tmp_path / "cache", boxes, most_open=2)
    held = cache.load(0, "matter_counts")
    assert np.array_equal(held, boxes[0].open().read("matter_counts"))
    for n in range(4):
        cache.load(n, "matter_counts")
        cache.load(n, "galaxy_counts")
    assert {box for box, _ in cache._open} <= {2, 3}
    cache.keep([1, 3])
    assert {path.name[:6] for path in cache.folder.iterdir()} == {"000001", "000003"}
    assert held.sum() > 0  # still mapped
    assert np.array_equal(cache.load(0, "matter_counts"), held)  # decoded again
    cache.remove()
    assert not cache.folder.exists()


def test_cache_bound_sets_the_window(grids: Path, tmp_path: Path) -> None:
    fields = ("matter_counts", "galaxy_counts")
    box_gib = 2 * 16**3 * 4 / 2**30
    assert GridData(CropsConfig(crop=8), [grids], fields, tmp_path).window == 2
    assert GridData(CropsConfig(crop=8, cache_gib=1.9 * box_gib), [grids], fields, tmp_path).window == 1


def test_validation_batches_cover_the_boxes_whatever_the_ranks(grids: Path, tmp_path: Path) -> None:
    config = CropsConfig(crop=8, tile=8, halo=2)
    data = GridData(config, [grids], ("matter_counts",), tmp_path, alignment=2, reach=9)
    total = data.validation[0].open().read("matter_counts").sum()

    def tiles_of(world_size: int, done: int) -> list[list[float | None]]:
        """Interior sums by rank."""
        found: list[list[float | None]] = [[] for _ in range(world_size)]
        for rank, sums in enumerate(found):
            group = ddp.Group(rank, world_size, rank, ALONE.device)
            for batch in data.validation_batches(group, done):
                assert batch is None or batch["halo"] == 2
                interior = (..., *[slice(2, -2)] * 3)
                sums.append(None if batch is None else batch["matter_counts"][interior].sum().item())
        return found

    alone = tiles_of(1, 0)[0]
    assert len(alone) == 8
    assert sum(value or 0 for value in alone) == total
    for world_size, done in ((3, 0), (3, 2), (2, 7), (4, 8)):
        found = tiles_of(world_size, done)
        assert len({len(sums) for sums in found}) == 1  # as many rounds on every rank
        rounds = [value for row in zip(*found, strict=True) for value in row]
        assert rounds[: 8 - done] == alone[done:]
        assert set(rounds[8 - done :]) <= {None}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_in_order(grids: Path, tmp_path: Path, workers: int) -> None:
    config = CropsConfig(crop=8, margin=1, crops_per_box=4, workers=workers)
    data = GridData(config, [grids], ("matter_counts", "galaxy_counts"), tmp_path / "cache")
    order = data.sampler(ALONE, 4, 2, seed=2)
    batches = data.batches(ALONE, 4, 2, seed=2)
    random_state = torch.get_rng_state()
    for epoch, first in ((0, 0), (1, 1)):
        order.start_at(epoch, first)
        expected = [[data_of(data, index) for index in batch] for batch in order]
        batches.start_at(epoch, first)
        for step in range(2 - first):
            while not batches.wait(0.01):
                continue
            parts = batches.take()
            assert len(parts) == 2
            for batch, samples in zip(parts, expected[2 * step : 2 * step + 2], strict=True):
                assert (batch["halo"], batch["periodic"]) == (1, False)
                assert np.array_equal(batch["matter_counts"].numpy(), np.stack(samples))
    # what a model draws does not depend on who makes its batches
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_batch_that_fails_says_so(grids: Path, tmp_path: Path) -> None:
    data = GridData(CropsConfig(crop=8, workers=0), [grids], ["matter_counts"], tmp_path / "cache")
    batches = data.batches(ALONE, 4, 1, seed=2)
    batches.start_at(0, 0)
    with small_disk(tmp_path / "cache" / "disk", 1 << 16) as disk, filled(disk):
        data.cache.folder = disk / "host"
        while not batches.wait(1):
            continue
        with pytest.raises(
            durable.NotEnoughSpace, match=r"no room for box box_\d, decoded \(data\.cache_gib"
        ):
            batches.take()


def test_batches_carry_the_parameters_of_their_simulations(grids: Path, tmp_path: Path) -> None:
    names = ("A_SN1", "Omega_m", "redshift")
    config = CropsConfig(crop=8, crops_per_box=4, workers=0, tile=8, halo=0)
    data = GridData(config, [grids], ("matter_counts",), tmp_path / "cache", parameters=names)
    of_box = torch.tensor([[1, 0.2, 0], [2, 0.3, 0], [4, 0.4, 0]])
    batches, order = data.batches(ALONE, 4, 1, seed=2), data.sampler(ALONE, 4, 1, seed=2)
    batches.start_at(0, 0)
    for indices in order:
        while not batches.wait(0.01):
            continue
        (batch,) = batches.take()
        assert batch["parameters"].dtype == torch.float32
        torch.testing.assert_close(batch["parameters"], of_box[[index.box for index in indices]])
    for tile in data.validation_batches(ALONE):
        assert tile is not None
        torch.testing.assert_close(tile["parameters"], of_box[2:])
    assert [value.tolist() for value in data.training_fields("A_SN1")] == [[1], [2]]
    with pytest.raises(StoreError, match=r"box_0: parameter 'A_SN3'.*did you mean 'A_SN1'"):
        GridData(config, [grids], ("matter_counts",), tmp_path / "cache", parameters=("A_SN3",))


def test_ranks_may_change_within_an_epoch() -> None:
    """4 ranks, then 2, then 1: every sample of the epoch once, in the step it has on one rank."""

    def steps(world_size: int, first: int, last: int) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in range(last - first)]
        for rank in range(world_size):
            sampler = CropSampler(6, 8, 2, 8, 2, rank, world_size, seed=3)
            sampler.start_at(1, first)
            for part, indices in enumerate(sampler):
                if part // 2 < last - first:
                    before = len(found[part // 2])
                    found[part // 2] |= {index.sample for index in indices}
                    assert len(found[part // 2]) == before + len(indices)
        return found

    assert steps(4, 0, 2) + steps(2, 2, 5) + steps(1, 5, 6) == steps(1, 0, 6)
    assert set.union(*steps(1, 0, 6)) == set(range(48))


def data_of(data: GridData, index: CropIndex) -> np.ndarray:
    return CropDataset(data.cache, ["matter_counts"], 8, 16, seed=2)[index]["matter_counts"]


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ({"crop": 32}, ["matter_counts"], "data.crop is 32, larger than the mesh of 16"),
        ({"crop": 16, "margin": 2}, ["matter_counts"], "set it to 0"),
        ({"crop": 8}, ["matter_count"], "did you mean 'matter_counts'"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    grids: Path, tmp_path: Path, config: dict, fields: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GridData(CropsConfig(**config), [grids], fields, tmp_path)


def test_splits_and_meshes_are_checked(tmp_path: Path, grids: Path) -> None:
    make_grids(tmp_path / "unsplit", splits=("train", "test"))
    with pytest.raises(ValueError, match="no simulation has the split 'validation'"):
        GridData(CropsConfig(crop=8), [tmp_path / "unsplit"], ["matter_counts"], tmp_path)
    make_grids(tmp_path / "finer", n_mesh=32)
    with pytest.raises(ValueError, match="meshes differ"):
        GridData(CropsConfig(crop=8), [grids, tmp_path / "finer"], ["matter_counts"], tmp_path)
    with pytest.raises(StoreError, match="no grid store here"):
        GridData(CropsConfig(crop=8), [tmp_path], ["matter_counts"], tmp_path)


def test_batches_that_do_not_divide_are_refused(grids: Path, tmp_path: Path) -> None:
    data = GridData(CropsConfig(crop=8, crops_per_box=2), [grids], ["matter_counts"], tmp_path)
    with pytest.raises(ValueError, match="multiple of ranks x accumulate = 2 x 2"):
        data.sampler(ddp.Group(0, 2, 0, ALONE.device), 6, 2, seed=0)
    with pytest.raises(ValueError, match=r"raise data\.crops_per_box"):
        data.sampler(ALONE, 8, 1, seed=0)
    with pytest.raises(ValueError, match="leaves nothing"):
        CropsConfig(crop=8, margin=4)


def test_room_is_asked_for_what_is_not_yet_decoded(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, fields = CropsConfig(crop=8, workers=0), ["matter_counts"]
    data = GridData(config, [grids], fields, tmp_path / "cache")
    box_bytes = data.training[0].open().array("matter_counts").nbytes
    room = box_bytes * len(data.training)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room - 1))
    with pytest.raises(durable.NotEnoughSpace, match="decoded boxes"):
        GridData(config, [grids], fields, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    data.cache.load(0, "matter_counts")
    GridData(config, [grids], fields, tmp_path / "cache")
