"""Frames and clips as a loader hands them out: the same with any workers, every test frame exactly once."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from aufast.data import (
    AAR_CROPPING,
    MARGL_CROPPING,
    ClipDataset,
    Cropping,
    FrameDataset,
    PackedDataset,
    Recipe,
    prepare_dataset,
    synthesize,
)

LENGTH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    root = tmp_path_factory.mktemp("datasets")
    tree = synthesize(root / "tree", Recipe(subjects=2, videos=1, frames=30, size=100, seed=3))
    # A gap of 12 frames in the first video: 8 frames, then 10.
    for k in range(9, 21):
        (tree / f"2D+3D/F001/T1/{k:04d}.jpg").unlink()
    prepare_dataset(tree, root / "packed")
    return PackedDataset(root / "packed")


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_frames(data: PackedDataset) -> None:
    frames = FrameDataset(data.videos, MARGL_CROPPING, train=False)
    assert len(frames) == 48
    for index, video, frame in ((0, 0, 0), (17, 0, 17), (18, 1, 0), (47, 1, 29)):
        item = frames[index]
        assert (item["video"], item["frame"]) == (video, frame)
        packed = data.videos[video]
        np.testing.assert_array_equal(item["image"], packed.frames[frame, 4:196, 4:196])
        np.testing.assert_array_equal(item["landmarks"], packed.landmarks[frame] - 4)
        np.testing.assert_array_equal(item["labels"], packed.labels[frame])
        np.testing.assert_array_equal(item["mask"], packed.mask[frame])
        assert (item["image"].dtype, item["labels"].dtype, item["mask"].dtype) == (
            torch.uint8,
            torch.int8,
            torch.bool,
        )
    with pytest.raises(IndexError, match="index must be from 0 to 47"):
        frames[48]


def test_test_clips_hold_every_frame_once(data: PackedDataset) -> None:
    clips = ClipDataset(data.videos, AAR_CROPPING, train=False, length=LENGTH)
    seen = []
    for k in range(len(clips)):
        item = clips[k]
        assert item["images"].shape == (LENGTH, 176, 176, 3) and item["landmarks"].shape == (LENGTH, 49, 2)
        count = int(item["valid"].sum())
        assert item["valid"][:count].all() and not item["mask"][count:].any()
        rows = range(int(item["frame"]), int(item["frame"]) + count)
        seen += [(int(item["video"]), row) for row in rows]
        packed = data.videos[item["video"]]
        np.testing.assert_array_equal(item["images"][count - 1], packed.frames[rows[-1], 12:188, 12:188])
        np.testing.assert_array_equal(item["labels"][:count], packed.labels[rows.start : rows.stop])
        assert (item["images"][count:] == item["images"][count - 1]).all()
    assert seen == [(0, row) for row in range(18)] + [(1, row) for row in range(30)]
    firsts = [bool(clips[k]["first"]) for k in range(len(clips))]
    assert firsts == [True, True, False, True, False, False, False]  # 8 | 8 + 2 | 8 + 8 + 8 + 6


def test_gaps_split_clips_or_not(data: PackedDataset) -> None:
    assert len(ClipDataset(data.videos[:1], AAR_CROPPING, train=False, length=18, max_gap=12)) == 1
    assert len(ClipDataset(data.videos[:1], AAR_CROPPING, train=False, length=18, max_gap=11)) == 2


def test_training_clips_are_whole_and_move_with_the_epoch(data: PackedDataset) -> None:
    clips = ClipDataset(data.videos, AAR_CROPPING, train=True, length=LENGTH)
    assert len(clips) == 1 + 1 + 3
    starts = set()
    for epoch in range(12):
        clips.set_epoch(epoch)
        items = [clips[k] for k in range(len(clips))]
        assert all(item["valid"].all() for item in items)
        frames = [int(item["frame"]) for item in items]
        assert frames[0] == 0 and 8 <= frames[1] <= 10
        assert frames[3] - frames[2] == frames[4] - frames[3] == LENGTH  # clips of a stretch do not overlap
        starts.add(tuple(frames))
    assert len(starts) > 5


@pytest.mark.parametrize("kind", [FrameDataset, ClipDataset])
def test_training_depends_on_seed_epoch_and_index_alone(data: PackedDataset, kind: type) -> None:
    def make(seed: int = 0, epoch: int = 0):
        dataset = kind(data.videos, AAR_CROPPING, True, seed=seed)
        dataset.set_epoch(epoch)
        return dataset

    assert same(make()[1], make()[1])
    assert not same(make()[1], make(epoch=1)[1]) and not same(make()[1], make(seed=1)[1])
    dataset = make()
    dataset[0]
    assert same(dataset[1], make()[1])


def test_workers_see_the_same_items_and_the_epoch(data: PackedDataset) -> None:
    frames = FrameDataset(data.videos, AAR_CROPPING, train=True)
    loader = DataLoader(frames, batch_size=8, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        frames.set_epoch(epoch)
        for number, batch in enumerate(loader):
            for k in (0, 7):
                assert torch.equal(batch["image"][k], frames[8 * number + k]["image"])


def test_videos_travel_without_their_pixels(data: PackedDataset) -> None:
    frames = FrameDataset(data.videos, AAR_CROPPING, train=False)
    item = frames[0]
    travelled = pickle.dumps(data.videos)
    assert len(travelled) < 2000
    assert same(FrameDataset(pickle.loads(travelled), AAR_CROPPING, train=False)[0], item)


@pytest.mark.filterwarnings("error")
def test_items_are_copies_of_the_mapped_pixels(data: PackedDataset) -> None:
    """Also where the crop is the whole face, or the landmarks are not moved."""
    frames = FrameDataset(data.videos, Cropping(200, 200, 200, mirror=False), train=True)
    item = frames[0]
    for value in item.values():
        value.zero_()
    assert frames[0]["image"].any() and frames[0]["landmarks"].any()


def test_refuses(data: PackedDataset) -> None:
    with pytest.raises(ValueError, match="there is no video"):
        FrameDataset([], AAR_CROPPING, train=True)
    with pytest.raises(ValueError, match="length must be at least 1"):
        ClipDataset(data.videos, AAR_CROPPING, train=True, length=0)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Ten thousand frames are read and not kept: only the cache of mapped files may grow."""
    import tracemalloc

    tree = synthesize(tmp_path / "tree", Recipe(subjects=1, videos=1, frames=50, size=100))
    prepare_dataset(tree, tmp_path / "packed")
    frames = FrameDataset(PackedDataset(tmp_path / "packed").videos, AAR_CROPPING, train=True)
    frames[0]
    tracemalloc.start()
    for k in range(10_000):
        frames[k % 50]
        if k == 100:
            before = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 100_000
