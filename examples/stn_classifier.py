"""A spatial transformer that finds a shape in a cluttered image before classifying it.

The images are generated: a cross, a square or a diagonal somewhere on noise. The localisation network gives
one affine matrix an image, and `roi_crop` samples with it; `affine_grid` + `grid_sample` would be the same
numbers. Run it with `python examples/stn_classifier.py`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aufast.ops import roi_crop

SIDE, SHAPE = 32, 9


def generated_shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, SIDE, SIDE) and labels (count,)."""
    shapes = torch.zeros(3, SHAPE, SHAPE)
    shapes[0, SHAPE // 2], shapes[0, :, SHAPE // 2] = 1, 1
    shapes[1, (0, -1)], shapes[1, :, (0, -1)] = 1, 1
    shapes[2] = torch.eye(SHAPE)
    images = 0.2 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    corners = torch.randint(SIDE - SHAPE, (count, 2), generator=generator)
    for image, label, (y, x) in zip(images, labels, corners.tolist(), strict=True):
        image[0, y : y + SHAPE, x : x + SHAPE] += shapes[label]
    return images, labels


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.locate = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * (SIDE // 4) ** 2, 6),
        )
        nn.init.zeros_(self.locate[-1].weight)
        self.locate[-1].bias.data = torch.tensor([0.6, 0, 0, 0, 0.6, 0])  # begin in the middle
        self.classify = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, images: Tensor) -> Tensor:
        theta = self.locate(images).view(-1, 1, 2, 3)  # (B, 1, 2, 3)
        # Before: F.grid_sample(images, F.affine_grid(theta[:, 0], (len(images), 1, 16, 16)))
        crops = roi_crop(images, theta, (16, 16))  # (B, 1, 1, 16, 16)
        return self.classify(crops)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Classifier()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(options.iterations):
        images, labels = generated_shapes(64, generator)
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, labels = generated_shapes(300, generator)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy on generated images: {accuracy:.0%} (chance: 33%)")
    return accuracy


if __name__ == "__main__":
    main()
