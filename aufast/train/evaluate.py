"""F1-frame of a model on videos, exact however they are dealt out over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from aufast.data import ClipDataset, Cropping, FrameDataset, PackedVideo
from aufast.faces import au_centers
from aufast.models import AAR, MARGL, to_input
from aufast.train.batches import to_device
from aufast.train.metrics import F1Frame
from aufast.train.processes import Processes


def score(
    model: MARGL | AAR,
    videos: Sequence[PackedVideo],
    columns: Tensor,
    processes: Processes,
    *,
    batch: int = 32,
    clip: int = 48,
    loaders: int = 0,
    frames_only: bool = False,
) -> F1Frame:
    """Count a model's right and wrong answers on every frame of some videos, once.

    AAR sees each video from its start to its end, in clips whose states are carried on; a gap in the video
    starts anew. Every process of `torchrun` takes other frames (MARGL) or other videos (AAR), and all of them
    return the counts of the whole.

    Args:
        model: on the processes' device.
        videos: what is tested.
        columns: (m,) of their labels, those of the model's AUs.
        processes: who shares the work.
        batch: frames at once (MARGL).
        clip: frames at once (AAR); "aa-gsp-tavg" averages over as many.
        loaders: processes that load.
        frames_only: take AAR's answers from each frame alone, those of its first stage.

    Returns:
        The metric, summed over all processes.
    """
    metric = F1Frame(model.config.aus)
    was_training = model.training
    processes.share_buffers(model)
    model.eval()
    columns = columns.to(processes.device)
    with torch.inference_mode():
        if isinstance(model, MARGL):
            _score_frames(metric, model, videos, columns, processes, batch, loaders)
        elif mine := list(videos)[processes.rank :: processes.world]:
            _score_clips(metric, model, mine, columns, processes, clip, loaders, frames_only)
    model.train(was_training)
    metric.all_reduce()
    return metric


def _cropping(model: MARGL | AAR) -> Cropping:
    size = model.config.image_size
    return Cropping(size, size, size)


def _score_frames(
    metric: F1Frame,
    model: MARGL,
    videos: Sequence[PackedVideo],
    columns: Tensor,
    processes: Processes,
    batch: int,
    loaders: int,
) -> None:
    frames = FrameDataset(videos, _cropping(model), train=False)
    mine = Subset(frames, range(processes.rank, len(frames), processes.world))
    for item in DataLoader(mine, batch, num_workers=loaders):
        item = to_device(item, processes.device)
        centers = au_centers(item["landmarks"], model.config.aus, "margl")
        found = model(to_input(item["image"], model.config), centers)
        metric.update(found.probabilities, item["labels"][..., columns], item["mask"][..., columns])


def _score_clips(
    metric: F1Frame,
    model: AAR,
    videos: Sequence[PackedVideo],
    columns: Tensor,
    processes: Processes,
    clip: int,
    loaders: int,
    frames_only: bool,
) -> None:
    clips, state = ClipDataset(videos, _cropping(model), train=False, length=clip), None
    for item in DataLoader(clips, 1, num_workers=loaders):
        item = to_device(item, processes.device)
        frames = int(item["valid"].sum())  # a short clip is not filled up: its average would see that
        found = model(to_input(item["images"][:, :frames], model.config), None if item["first"] else state)
        state = found.state
        probabilities = found.frame_probabilities if frames_only else found.probabilities
        metric.update(probabilities, item["labels"][:, :frames, columns], item["mask"][:, :frames, columns])
