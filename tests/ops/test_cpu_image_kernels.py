"""The compiled CPU kernels of roi_crop and region_conv: sizes, formats, odd regions, threads, levels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import aufast
from aufast import reference

pytestmark = [
    pytest.mark.skipif(
        not aufast.backends()["cpu"].startswith("ready"), reason="the compiled CPU part is not built"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior"),
]
# Relative RMS error against exact arithmetic on the same rounded numbers: a sum of a few thousand float32
# products; for the short types, whose sums are kept in float32, the rounding of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
FORMATS = [
    pytest.param(torch.contiguous_format, id="nchw"),
    pytest.param(torch.channels_last, id="channels_last"),
]
Operator = Callable[..., Tensor]


def difference(actual: Tensor, truth: Tensor) -> float:
    """Relative RMS error; NaNs must lie at the same places and count as equal."""
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape
    assert torch.equal(actual.isnan(), truth.isnan())
    scale = truth.nan_to_num().norm()
    return ((actual - truth).nan_to_num().norm() / scale.clamp_min(1e-30)).item()


def gradients(call: Operator, inputs: list[Tensor | None], grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """The output, then the gradient of every input that is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    wanted = [t for t in leaves if t is not None]
    if grad is None:  # of few bits, so that every dtype holds the same one
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return out, *torch.autograd.grad(out, wanted, grad.to(out.dtype), materialize_grads=True)


def assert_right(
    kernel: Operator, definition: Operator, inputs: list[Tensor | None], grad: Tensor | None = None
) -> None:
    """Output and every gradient of the kernel against the float64 definition of the same numbers."""
    found = gradients(kernel, inputs, grad)
    truth = gradients(definition, [None if t is None else t.double() for t in inputs], grad)
    computed_in = torch.promote_types(inputs[0].dtype, torch.float32)
    for actual, expected in zip(found, truth, strict=True):
        assert difference(actual, expected) <= max(TOLERANCE[actual.dtype], TOLERANCE[computed_in])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- roi_crop


def crop(size: tuple[int, int], align_corners: bool = False) -> tuple[Operator, Operator]:
    def kernel(features: Tensor, rois: Tensor) -> Tensor:
        return aufast.ops.roi_crop(features, rois, size, align_corners=align_corners, backend="cpu")

    def definition(features: Tensor, rois: Tensor) -> Tensor:
        return reference.roi_crop(features, rois, size, align_corners=align_corners)

    return kernel, definition


def boxes_on(batch: int, regions: int, height: int, width: int) -> Tensor:
    """Boxes of every size, some of them mirrored, many reaching outside."""
    span = torch.tensor([width, height, width, height], dtype=torch.float64)
    return (torch.rand(batch, regions, 4, dtype=torch.float64) * 1.6 - 0.3) * span


def rois_for(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "regions", "channels", "height", "width", "size"),
    [
        (2, 24, 128, 24, 24, (6, 6)),
        (2, 5, 17, 12, 9, (6, 6)),
        (1, 1, 1, 1, 1, (1, 1)),
        (3, 2, 16, 1, 17, (1, 17)),
        (1, 3, 33, 40, 50, (3, 2)),
        (2, 2, 70, 7, 5, (17, 19)),
        (1, 300, 4, 6, 6, (2, 3)),
        (1, 2, 160, 64, 64, (2, 2)),
        (1, 1000, 3, 5, 7, (2, 2)),
        (1, 2, 1000, 6, 6, (3, 3)),
        (1, 2, 2, 1000, 17, (5, 3)),
        (1, 2, 2, 17, 1000, (1, 1000)),
    ],
)
def test_boxes(
    batch: int,
    regions: int,
    channels: int,
    height: int,
    width: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    features = torch.randn(batch, channels, height, width).to(dtype, memory_format=memory_format)
    rois = boxes_on(batch, regions, height, width).to(rois_for(dtype))
    assert_right(*crop(size), [features, rois])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_regions(dtype: torch.dtype, align_corners: bool, memory_format: torch.memory_format) -> None:
    features = torch.randn(2, 21, 13, 11).to(dtype, memory_format=memory_format)
    theta = torch.randn(2, 7, 2, 3, dtype=rois_for(dtype)) * 0.6
    theta[:, 0, 0, 1] = theta[:, 0, 1, 0] = 0  # one of them axis-aligned
    assert_right(*crop((5, 7), align_corners), [features, theta])


def test_regions_in_double_beside_float_features() -> None:
    assert_right(*crop((6, 6)), [torch.randn(1, 9, 12, 12), boxes_on(1, 4, 12, 12).float().double()])


DEGENERATE = {
    "outside": (50.0, 50.0, 60.0, 60.0),
    "left_of_the_map": (-30.0, 2.0, -20.0, 5.0),
    "touching": (11.3, 3.1, 14.2, 8.3),
    "mirrored": (9.3, 8.1, 2.2, 1.7),
    "one_column": (4.3, 1.2, 4.3, 8.9),
    "one_point": (4.3, 2.2, 4.3, 2.2),
    "huge": (-1e6, -1e6, 1e6, 1e6),
    "astronomic": (-1e30, 3.1, 1e30, 4.2),
    "not_a_number": (float("nan"), 1.0, 5.0, 6.0),
    "infinite": (0.0, 1.0, float("inf"), 6.0),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_degenerate_regions_and_their_sound_neighbour(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    features = torch.randn(1, 19, 10, 12).to(dtype, memory_format=memory_format)
    rois = torch.tensor([[*DEGENERATE.values(), (1.2, 2.3, 7.4, 8.6)]], dtype=dtype)
    kernel, definition = crop((6, 6))
    out, d_features, d_rois = gradients(kernel, [features, rois])
    truth = gradients(definition, [features.double(), rois.double()])
    for k, name in enumerate([*DEGENERATE, "sound"]):
        assert difference(out[:, k], truth[0][:, k]) <= TOLERANCE[dtype], name
        assert difference(d_rois[:, k], truth[2][:, k]) <= 10 * TOLERANCE[dtype], name
    assert difference(d_features, truth[1]) <= TOLERANCE[dtype]


AFFINE_DEGENERATE = {
    "one_point": [[0.0, 0.0, 0.31], [0.0, 0.0, -0.22]],
    "a_line": [[0.7, 0.7, 0.1], [0.35, 0.35, 0.05]],
    "mirrored_and_turned": [[0.03, -0.81, 0.1], [-0.72, 0.04, 0.2]],
    "outside": [[0.1, 0.2, 9.0], [0.3, 0.1, -7.0]],
    "huge": [[1e5, 3e4, 0.1], [2e4, 1e5, 0.2]],
    "astronomic": [[1e30, 1e29, 0.0], [1e29, 1e30, 0.0]],
    "not_a_number": [[0.5, float("nan"), 0.0], [0.0, 0.5, 0.0]],
    "infinite": [[0.5, 0.0, 0.0], [0.0, float("inf"), 0.0]],
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
def test_degenerate_affine_regions(align_corners: bool, memory_format: torch.memory_format) -> None:
    features = torch.randn(1, 19, 10, 12, dtype=torch.float64).contiguous(memory_format=memory_format)
    theta = torch.tensor([list(AFFINE_DEGENERATE.values())], dtype=torch.float64)
    kernel, definition = crop((6, 6), align_corners)
    out, d_features, d_theta = gradients(kernel, [features, theta])
    truth = gradients(definition, [features, theta])
    for k, name in enumerate(AFFINE_DEGENERATE):
        limit = 1e-9 if name == "huge" else 1e-12  # few digits are left a million pixels away
        assert difference(out[:, k], truth[0][:, k]) <= limit, name
        assert difference(d_theta[:, k], truth[2][:, k]) <= limit, name
    assert difference(d_features, truth[1]) <= 1e-9


def test_pixels_outside_every_tap_may_be_anything() -> None:
    """What lies outside the map is zero even beside a border that is not finite."""
    features = torch.randn(1, 18, 8, 8)
    features[..., 0], features[..., 0, :], features[..., 7] = torch.nan, torch.inf, torch.nan
    rois = torch.tensor([[[2.0, 2.0, 6.0, 6.0], [-9.0, -9.0, -3.0, -3.0], [20.0, 0.0, 30.0, 8.0]]])
    kernel, definition = crop((4, 4))
    assert difference(kernel(features, rois), definition(features, rois)) <= 1e-6


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["no_images", "no_regions", "no_channels"]
)
def test_empty_crops(shape: tuple[int, int, int]) -> None:
    batch, regions, channels = shape
    assert_right(*crop((6, 6)), [torch.randn(batch, channels, 5, 5), torch.rand(batch, regions, 4) * 5])


def test_views_of_features_regions_and_gradients() -> None:
    kernel, definition = crop((6, 6))
    big = torch.randn(3, 40, 12, 14, dtype=torch.float64)
    rois = boxes_on(2, 5, 12, 12)
    views = [
        big[1:, 3:20, :, 1:13],
        big[:1, :17, :, :12].expand(2, -1, -1, -1),
        big[1:].transpose(2, 3)[:, :, :12],
        big.to(memory_format=torch.channels_last)[1:, :, :, :12],
        big.to(memory_format=torch.channels_last)[1:, 2:19],
    ]
    for features in views:
        channels = features.shape[1]
        for grad in (
            torch.randn(2, 5, 6, 6, channels, dtype=torch.float64).permute(0, 1, 4, 2, 3),
            torch.randn(1, 1, 1, 1, 1, dtype=torch.float64).expand(2, 5, channels, 6, 6),
            torch.randn(2, 5, channels, 6, 12, dtype=torch.float64)[..., ::2],
        ):
            for regions in (rois, rois.flip(1), rois[:1, :1].expand(2, 5, 4)):
                assert_right(kernel, definition, [features, regions], grad)


# ---- region_conv


def convolve(*arguments: Tensor | None) -> Tensor:
    return aufast.ops.region_conv(*arguments, backend="cpu")


def region_inputs(
    batch: int, cin: int, cout: int, n: int, rows: int, columns: int, dtype: torch.dtype, affine: bool = True
) -> list[Tensor | None]:
    x, weight = torch.randn(batch, cin, n * rows, n * columns), torch.randn(n, n, cout, cin, 3, 3)
    bias, scale, shift = torch.randn(n, n, cout), torch.randn(n, n, cin), torch.randn(n, n, cin)
    weight /= (9 * max(cin, 1)) ** 0.5
    tensors = (x, weight, bias, scale, shift) if affine else (x, weight, bias)
    return [*(t.to(dtype) for t in tensors), *([] if affine else [None, None])]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "cin", "cout", "n", "rows", "columns"),
    [
        (2, 32, 16, 2, 22, 22),
        (1, 16, 8, 1, 44, 44),
        (3, 5, 7, 2, 11, 13),
        (2, 17, 9, 3, 1, 1),
        (1, 1, 1, 1, 1, 17),
        (2, 3, 19, 2, 17, 1),
        (0, 4, 4, 2, 3, 3),
        (1, 8, 8, 1, 2, 100),
        (5, 6, 4, 1, 9, 9),
        (1, 1000, 2, 1, 3, 2),
        (1, 2, 1000, 1, 2, 3),
        (1, 2, 3, 1, 1000, 1),
        (1, 3, 2, 1, 1, 1000),
        (1, 1, 1, 17, 1, 2),
        # By minimal filtering: odd sizes, rows of one tile and of several vectors, several blocks of rows.
        (3, 17, 9, 2, 17, 19),
        (1, 40, 24, 1, 70, 71),
        (2, 8, 16, 1, 2, 200),
        (1, 16, 8, 1, 200, 2),
        (1, 16, 33, 1, 131, 1),
        (1, 9, 15, 1, 15, 33),
        (1, 300, 11, 1, 9, 31),
        (0, 16, 16, 1, 22, 22),
    ],
)
def test_region_conv(
    batch: int,
    cin: int,
    cout: int,
    n: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    inputs = region_inputs(batch, cin, cout, n, rows, columns, dtype)
    inputs[0] = inputs[0].contiguous(memory_format=memory_format)
    assert_right(convolve, reference.region_conv, inputs)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_region_conv_without_the_activation(with_bias: bool) -> None:
    inputs = region_inputs(2, 6, 10, 2, 5, 8, torch.float64, affine=False)
    assert_right(convolve, reference.region_conv, inputs if with_bias else [*inputs[:2], None, None, None])


def test_region_conv_takes_views() -> None:
    inputs = region_inputs(2, 6, 10, 2, 5, 8, torch.float64)
    big = torch.randn(3, 9, 10, 33, dtype=torch.float64)
    for x in (
        big[1:, 2:8, :, 1:17],
        big[1:, 1:7, :, ::2][..., :16],
        big[:1, :6, :, :16].expand(2, -1, -1, -1),
    ):
        inputs[0] = x
        for grad in (
            torch.randn(2, 10, 10, 16, dtype=torch.float64).to(memory_format=torch.channels_last),
            torch.randn(1, 1, 1, 1, dtype=torch.float64).expand(2, 10, 10, 16),
        ):
            assert_right(convolve, reference.region_conv, inputs, grad)
    transposed = inputs[1].transpose(0, 1)
    assert_right(convolve, reference.region_conv, [inputs[0], transposed, *inputs[2:]])


def test_a_nan_stays_in_its_patch_and_passes_the_relu() -> None:
    inputs = region_inputs(1, 4, 4, 2, 6, 6, torch.float32)
    inputs[0][0, 1, 2, 2] = torch.nan
    out, truth = convolve(*inputs), reference.region_conv(*inputs)
    assert torch.equal(out.isnan(), truth.isnan())
    assert out[..., 2, 2].isnan().all() and out[..., 6:, :].isfinite().all() and out[..., 6:].isfinite().all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("cin", "cout", "size"),
    [(32, 16, (22, 22)), (16, 8, (44, 44)), (128, 128, (17, 23)), (1000, 8, (16, 16))],
)
def test_minimal_filtering_is_as_exact_as_a_convolution(
    cin: int, cout: int, size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    """At most twice as far from float64 as PyTorch's own convolution."""
    inputs = region_inputs(2, cin, cout, 1, *size, torch.float32, affine=False)
    inputs[0] = inputs[0].contiguous(memory_format=memory_format)
    truth = reference.region_conv(*(None if t is None else t.double() for t in inputs))
    own = F.conv2d(inputs[0], inputs[1][0, 0], inputs[2][0, 0], padding=1)
    assert difference(convolve(*inputs), truth) <= 2 * difference(own, truth)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "scale", "shift"])
def test_minimal_filtering_shows_what_is_not_finite_where_the_sum_over_taps_does(
    name: str, value: float
) -> None:
    """At the same places; what the sum over taps makes infinite may be NaN, never a number."""
    inputs = region_inputs(2, 16, 8, 2, 19, 22, torch.float32)
    inputs[2:] = [t.abs() + 1 for t in inputs[2:]]  # every ReLU that could hide it is open
    inputs[0] = inputs[0].abs()
    place = {
        "x": (1, 3, 5, 6),
        "weight": (0, 1, 2, 3, 1, 1),
        "bias": (0, 1, 2),
        "scale": (0, 1, 2),
        "shift": (0, 1, 2),
    }
    inputs[["x", "weight", "bias", "scale", "shift"].index(name)][place[name]] = value
    out, truth = convolve(*inputs), reference.region_conv(*inputs)
    assert torch.equal(out.isfinite(), truth.isfinite())
    assert out[..., 19:, :].isfinite().all() and not (truth.isnan() & ~out.isnan()).any()
    assert difference(out.nan_to_num(0, 0, 0), truth.nan_to_num(0, 0, 0)) <= 1e-6


# ---- both


def calls(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> list[tuple[Operator, list[Tensor | None]]]:
    torch.manual_seed(3)
    features = torch.randn(3, 90, 12, 12).to(dtype, memory_format=memory_format)
    convolution = region_inputs(3, 18, 11, 2, 9, 7, dtype)
    convolution[0] = convolution[0].contiguous(memory_format=memory_format)
    return [
        (crop((6, 6))[0], [features, boxes_on(3, 11, 12, 12).to(rois_for(dtype))]),
        (crop((6, 6))[0], [features[:1], torch.randn(1, 9, 2, 3, dtype=rois_for(dtype))]),
        (convolve, convolution),
    ]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_at_any_number_of_threads(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append([t for call, inputs in calls(dtype, memory_format) for t in gradients(call, inputs)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(level: str) -> None:
    """All tests of this file again, in a process that is held to a level."""
    program = "import aufast, torch; aufast.ops.roi_crop(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 4))"
    environment = os.environ | {"AUFAST_CPU_ISA": level}
    here = Path(__file__).parents[2]
    probe = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=here, capture_output=True, text=True
    )
    if "best level is" in probe.stderr:
        pytest.skip(f"this CPU has no {level}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not every_instruction_set",
        __file__,
    ]
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
