"""What a call costs beyond its work: the smallest crop and convolution beside `mul`, without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from aufast import ops


def best(call: Callable[[], object], calls: int = 300, rounds: int = 300) -> float:
    """Seconds a call, of the fastest round."""
    found = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found = min(found, (time.perf_counter() - start) / calls)
    return found


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    a, image, boxes = torch.ones(2, 2), torch.ones(1, 1, 4, 4), torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
    x, U, Q, W = torch.ones(1, 2, 1), torch.ones(2, 1), torch.ones(2, 1), torch.ones(1, 1, 1)
    mul = best(lambda: torch.mul(a, a))
    print(f"mul         {mul * 1e6:5.2f} µs")
    for name, call in (
        ("roi_crop", lambda: ops.roi_crop(image, boxes, (1, 1))),
        ("graph_conv", lambda: ops.graph_conv(x, U, Q, W)),
    ):
        print(f"{name:11s} {(best(call) - mul) * 1e6:5.2f} µs more")


if __name__ == "__main__":
    main()
