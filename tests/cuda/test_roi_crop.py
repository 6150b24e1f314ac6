"""roi_crop's CUDA kernels in the emulator: tiles, tails, barriers and both formats against the definition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from aufast import reference
from aufast.ops.roi_crop import MOST_CROP_WIDTH, _cuda_limit
from tests.cuda.emulator.building import ROOT, emulated
from tests.samples import SAMPLES, Sample, relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
CROPS = [sample for sample in SAMPLES if sample.operator == "roi_crop"]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> Iterator[None]:
    library = torch.library.Library("aufast_emulator", "FRAGMENT")
    for name in ("roi_crop", "roi_crop_backward"):
        schema = getattr(torch.ops.aufast, name).default._schema
        library.define(str(schema).removeprefix("aufast::"))
    torch.ops.load_library(emulated(ROOT / "csrc" / "cuda" / "roi_crop.cu"))
    yield
    library._destroy()


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUFAST_EMULATED_LOG", str(tmp_path / "launches"))
    return tmp_path / "launches"


class Call(NamedTuple):
    features: Tensor
    rois: Tensor
    size: tuple[int, int]
    align_corners: bool = False

    def to(self, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Call:
        rois = self.rois.to(torch.promote_types(dtype, torch.float32))
        return self._replace(features=self.features.to(dtype).contiguous(memory_format=layout), rois=rois)

    def grad(self) -> Tensor:
        shape = (*self.rois.shape[:2], self.features.shape[1], *self.size)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return values.to(self.features.dtype)


def call_of(sample: Sample) -> Call:
    tensors, options = sample.tensors, sample.options
    return Call(tensors["features"], tensors["rois"], options["size"], options.get("align_corners", False))


def made(
    features: tuple[int, int, int, int], regions: int, size: tuple[int, int], theta: bool = False
) -> Call:
    """Boxes of which some reach over the border, some are mirrored and most are smaller than the map."""
    generator = torch.Generator().manual_seed(4)
    batch, _, height, width = features
    values = torch.randn(features, generator=generator, dtype=torch.float64)
    if theta:
        rois = torch.randn(batch, regions, 2, 3, generator=generator, dtype=torch.float64) * 0.5
        return Call(values, rois, size)
    centre = torch.rand(batch, regions, 2, generator=generator, dtype=torch.float64)
    half = torch.rand(batch, regions, 2, generator=generator, dtype=torch.float64) * 0.5 - 0.1
    scale = torch.tensor([width, height, width, height])
    return Call(values, torch.cat([centre - half, centre + half], dim=-1) * scale, size)


# Several tiles of channels, groups of regions and chunks of taps, rows of crops in bands, squares of pixels;
# tails of each; maps that do not fit.
CALLS = {
    "paper-layer3": made((1, 40, 12, 12), 24, (6, 6)),
    "odd": made((2, 19, 7, 5), 11, (3, 5)),
    "whole-vectors": made((2, 24, 9, 8), 5, (2, 4)),
    "many-channels": made((1, 150, 3, 4), 9, (2, 3)),
    "large-crops": made((1, 5, 6, 7), 2, (30, 21)),
    "too-large-to-gather": made((1, 3, 6, 7), 1, (31, 40)),
    "many-regions": made((1, 3, 5, 5), 150, (4, 4)),
    "larger-than-a-block": made((1, 3, 41, 35), 3, (5, 4)),
    "map-does-not-fit": made((1, 2, 90, 150), 2, (3, 3)),
    "rotated": made((2, 19, 9, 11), 5, (4, 5), theta=True),
    "rotated-large": made((1, 17, 35, 22), 2, (20, 17), theta=True),
    "widest": made((1, 1, 2, 3), 1, (1, MOST_CROP_WIDTH)),
    "widest-rotated": made((1, 1, 2, 3), 1, (1, MOST_CROP_WIDTH), theta=True),
    "highest": made((1, 2, 3, 2), 2, (MOST_CROP_WIDTH, 1)),
    "tall": made((1, 1, 3, 2), 1, (20_011, 1)),
}


def emulate(call: Call, needs: int = 3) -> dict[str, Tensor]:
    operators = torch.ops.aufast_emulator
    features, rois, size, align_corners = call
    d_features, d_rois = operators.roi_crop_backward(call.grad(), features, rois, align_corners, needs)
    crops = operators.roi_crop(features, rois, *size, align_corners)
    return {"crops": crops, "features": d_features, "rois": d_rois}


def define(call: Call) -> dict[str, Tensor]:
    features, rois = (t.detach().clone().requires_grad_() for t in (call.features, call.rois))
    crops = reference.roi_crop(features, rois, call.size, align_corners=call.align_corners)
    grads = torch.autograd.grad(crops, (features, rois), call.grad(), materialize_grads=True)
    return {"crops": crops.detach(), "features": grads[0], "rois": grads[1]}


def assert_right(call: Call) -> None:
    dtype = call.features.dtype
    exact = call._replace(features=call.features.double(), rois=call.rois.double())
    # The same rounded gradient on both sides.
    features, rois = (t.detach().clone().requires_grad_() for t in exact[:2])
    crops = reference.roi_crop(features, rois, call.size, align_corners=call.align_corners)
    grads = torch.autograd.grad(crops, (features, rois), call.grad().double(), materialize_grads=True)
    truth = {"crops": crops.detach(), "features": grads[0], "rois": grads[1]}
    found, plain = emulate(call), define(call)
    allowed = {torch.float64: 1e-13, torch.float32: 2e-6}
    for name, value in found.items():
        assert value.dtype == plain[name].dtype
        error = relative_error(value, truth[name])
        bound = allowed.get(dtype) or 2 * relative_error(plain[name], truth[name]) + 1e-6
        assert error <= bound, f"{name}: relative error {error:.2e} is above {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", CROPS, ids=str)
def test_every_option_is_the_definition(sample: Sample, dtype: torch.dtype) -> None:
    call = call_of(sample)
    rois = call.rois.to(torch.promote_types(dtype, torch.float32))
    assert_right(call._replace(features=call.features.to(dtype), rois=rois))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES[:3], pytest.param(DTYPES[3], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_cut_is_the_definition(
    name: str, dtype: torch.dtype, layout: torch.memory_format, log: Path
) -> None:
    call = CALLS[name].to(dtype, layout)
    assert_right(call)
    for line in log.read_text().splitlines():
        _, cluster, threads, shared = map(int, line.split())
        assert cluster == 1 and threads <= 608 and shared <= 96 << 10


def test_a_tall_rotated_crop_is_the_definition() -> None:
    """In float64: 20,011 float32 numbers added to six pixels are no measure of a kernel."""
    assert_right(made((1, 1, 3, 2), 1, (20_011, 1), theta=True))


def test_the_cuts_are_what_the_cases_are_named_for(log: Path) -> None:
    launches = {}
    for name, call in CALLS.items():
        log.unlink(missing_ok=True)
        emulate(call.to(torch.float32))
        launches[name] = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    forward = {name: runs[-1] for name, runs in launches.items()}
    backward = {name: runs[0] for name, runs in launches.items()}
    assert all(len(runs) == 3 for runs in launches.values())
    assert forward["odd"][0] > 2 and forward["many-regions"][0] > 1  # groups of regions
    assert forward["many-channels"][0] > 2 and backward["many-channels"][0] > 2
    assert backward["larger-than-a-block"][0] == 2 * 3  # squares of 32 × 19
    plain = {"map-does-not-fit", "too-large-to-gather", "rotated", "rotated-large", "widest-rotated"}
    plain |= {"tall"}
    assert {name for name, run in forward.items() if run[3] == 256 * 24} == plain


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["odd", "whole-vectors", "large-crops", "rotated", "larger-than-a-block"])
def test_the_order_of_threads_does_not_matter(
    name: str, layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No barrier is missing, and no sum depends on who comes first."""
    call = CALLS[name].to(dtype, layout)
    in_turn = emulate(call)
    for order in range(1, 4):
        monkeypatch.setenv("AUFAST_EMULATED_ORDER", str(order))
        for key, value in emulate(call).items():
            assert torch.equal(value, in_turn[key]), f"{key}, order {order}"


def test_formats_have_the_same_bits() -> None:
    planes = emulate(CALLS["whole-vectors"].to(torch.float32))
    last = emulate(CALLS["whole-vectors"].to(torch.float32, torch.channels_last))
    assert last["features"].is_contiguous(memory_format=torch.channels_last)
    assert last["crops"].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(planes["crops"], last["crops"])
    assert torch.equal(planes["features"], last["features"])


@pytest.mark.parametrize("name", ["odd", "rotated"])
def test_each_gradient_alone(name: str) -> None:
    call = CALLS[name].to(torch.float32)
    both = emulate(call)
    for needs, wanted, other in ((1, "features", "rois"), (2, "rois", "features")):
        alone = emulate(call, needs)
        assert torch.equal(alone[wanted], both[wanted]) and alone[other].shape == (0,)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_addresses_need_no_alignment(layout: torch.memory_format) -> None:
    """A view that starts one element later, and a gradient that is one number expanded."""
    call = CALLS["whole-vectors"].to(torch.bfloat16, layout)
    flat = torch.empty(call.features.numel() + 1, dtype=torch.bfloat16)
    shifted = flat[1:].as_strided(call.features.shape, call.features.stride(), 1).copy_(call.features)
    for key, value in emulate(call._replace(features=shifted)).items():
        assert torch.equal(value, emulate(call)[key]), key
    ones = torch.ones((), dtype=torch.bfloat16).expand(call.grad().shape)
    backward = torch.ops.aufast_emulator.roi_crop_backward
    expanded = backward(ones, call.features, call.rois, False, 3)
    whole = backward(ones.contiguous(), call.features, call.rois, False, 3)
    assert all(torch.equal(a, b) for a, b in zip(expanded, whole, strict=True))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_what_is_not_finite_stays_where_it_is(layout: torch.memory_format) -> None:
    """An infinite pixel reaches the samples beside it only, also across the border."""
    features = torch.ones(1, 4, 4, 5).contiguous(memory_format=layout)
    features[0, :, 0, 0] = torch.inf
    boxes = torch.tensor([[[1.5, 1.5, 4.5, 3.5], [-9.0, -9.0, -5.0, -5.0], [1.1, -3.0, 4.0, 0.9]]])
    crops = torch.ops.aufast_emulator.roi_crop(features, boxes, 3, 3, False)
    assert crops.isfinite().all()
    # θ takes the other kernel.
    theta = torch.tensor([[[[0.3, 0.0, 0.4], [0.0, 0.3, 0.4]], [[1.0, 0.0, 4.0], [0.0, 1.0, 0.0]]]])
    assert torch.ops.aufast_emulator.roi_crop(features, theta, 3, 3, False).isfinite().all()


def test_boxes_of_round_numbers_copy() -> None:
    features = torch.randn(1, 3, 9, 11)
    boxes = torch.tensor([[[0.0, 0, 7, 6], [4, 3, 11, 9], [11, 9, 4, 3]]])
    crops = torch.ops.aufast_emulator.roi_crop(features, boxes, 6, 7, False)
    assert torch.equal(crops[0, 0], features[0, :, :6, :7])
    assert torch.equal(crops[0, 1], features[0, :, 3:, 4:])
    assert torch.equal(crops[0, 2], features[0, :, 3:, 4:].flip(1, 2))


def test_crops_that_are_too_wide_are_refused_in_words() -> None:
    call = made((1, 2, 3, 3), 1, (1, 2000))
    with pytest.raises(RuntimeError, match="crops this wide, 2000, have no room on the GPU"):
        emulate(call)


def test_tensors_of_another_device_are_refused() -> None:
    """The dispatcher looks at one tensor: here it is told which kernel to call, as a mixture would be."""
    features, rois, size, align_corners = made((1, 2, 3, 3), 1, (2, 2)).to(torch.float32)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    crop, backward = (
        getattr(torch.ops.aufast_emulator, name).default.redispatch
        for name in ("roi_crop", "roi_crop_backward")
    )
    with pytest.raises(RuntimeError, match="roi_crop: rois is on another device than features"):
        crop(key, features, rois.to("meta"), *size, align_corners)
    grad = torch.ones(1, 1, 2, 2, 2)
    with pytest.raises(RuntimeError, match="roi_crop_backward: grad is on another device than features"):
        backward(key, grad.to("meta"), features, rois, align_corners, 3)
    with pytest.raises(RuntimeError, match="grad does not fit the features and the regions"):
        backward(key, grad[:, :, :1], features, rois, align_corners, 3)


def test_the_reason_names_the_size() -> None:
    features = torch.empty(1, 1, 4, 4)
    assert _cuda_limit(features, MOST_CROP_WIDTH, 2**15 - 1) is None
    assert _cuda_limit(features, 641, 6) == "it takes crops of at most 640 columns, and came 641"
    assert "at most 32767 pixels, and came 32768" in _cuda_limit(torch.empty(1, 1, 1, 2**15), 6, 6)
