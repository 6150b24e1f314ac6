"""Streams: the numbers of the whole clip, in any chunks, and never another video's state."""

from __future__ import annotations

import pytest
import torch

from aufast import optimize_for_inference
from tests.models.examples import inputs, randomize, small


def model_of(name="aar", dtype=torch.float64):
    model = small(name).to(dtype).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("optimized", [False, True], ids=["model", "optimized"])
@pytest.mark.parametrize("name", ["aar", "aa-gsp", "b-net"])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6), (2, 5), (0, 7)], ids=str)
@torch.no_grad()
def test_any_chunks_give_the_whole_clip(name, cuts, optimized):
    model = model_of(name)
    model = optimize_for_inference(model) if optimized else model
    (clips,) = inputs(model, steps=7, dtype=torch.float64)
    whole = model(clips)
    with model.stream(chunk=3) as stream:
        chunks = [stream(clips[:, a:b]) for a, b in zip((0, *cuts), (*cuts, 7), strict=True)]
        assert stream.frames == 7
    for field in ("probabilities", "frame_probabilities", "logits"):
        found = torch.cat([getattr(chunk, field) for chunk in chunks], dim=1)
        torch.testing.assert_close(found, getattr(whole, field))
    torch.testing.assert_close(chunks[-1].state, whole.state)


@torch.no_grad()
def test_frames_one_at_a_time_have_no_leading_axes():
    model = model_of()
    (clips,) = inputs(model, batch=1, steps=3, dtype=torch.float64)
    whole, one, chunk = model(clips), model.stream(), model.stream()
    for t in range(3):
        found = one(clips[0, t])
        assert found.attention.shape == (3, 8, 8)
        torch.testing.assert_close(found.probabilities, whole.probabilities[0, t])
    torch.testing.assert_close(chunk(clips[0]).probabilities, whole.probabilities[0])


def test_memory_does_not_grow_with_the_video():
    model = model_of()
    lengths = []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    stream = model.stream(chunk=2)
    stream(torch.zeros(5, 3, 32, 32, dtype=torch.float64))
    assert lengths == [2, 2, 1]
    # All that stays of the video is a state of fixed size, without a history of operations.
    assert [h.shape for h in stream.state] == [(1, 3, 24)] * 2
    assert not any(h.requires_grad for h in stream.state)


def test_a_new_video_starts_from_nothing():
    model = model_of()
    (clips,) = inputs(model, batch=1, dtype=torch.float64)
    stream = model.stream()
    first = stream(clips[0]).probabilities
    assert not torch.allclose(stream(clips[0]).probabilities, first)  # the same video, going on
    stream.reset()
    assert stream.frames == 0
    assert torch.equal(stream(clips[0]).probabilities, first)
    assert torch.equal(model.stream()(clips[0]).probabilities, first)


def test_a_closed_stream_takes_no_frame():
    model = model_of()
    frame = torch.zeros(3, 32, 32, dtype=torch.float64)
    with model.stream() as stream:
        stream(frame)
    with pytest.raises(RuntimeError, match="aar: this stream is closed; a new video needs a new one"):
        stream(frame)


def test_misuse_is_named():
    model = model_of()
    stream = model.stream()
    stream(torch.zeros(2, 1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="aar: this stream is of 2 videos, got frames of 1"):
        stream(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="aar: frames must be .*, got shape"):
        stream(torch.zeros(32, 32, dtype=torch.float64))
    with pytest.raises(TypeError, match="aar: frames must be .*, got list"):
        stream([1])
    with pytest.raises(ValueError, match="aar: chunk must be an integer of at least 1, got 0"):
        model.stream(chunk=0)
    with pytest.raises(ValueError, match="aa-gsp-tavg: its predictions are averages over the whole clip"):
        small("aa-gsp-tavg").stream()
    model.train()
    with pytest.raises(RuntimeError, match="aar: a stream needs the model in evaluation mode"):
        stream(torch.zeros(2, 1, 3, 32, 32, dtype=torch.float64))
