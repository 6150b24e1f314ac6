"""AGCRN on a traffic-like series: forecast the next hour at every node from the hour before.

The series is generated, not measured: daily waves with a phase of each node's own, noise, and congestion that
spreads along a ring. Run it with `python examples/agcrn_forecaster.py`.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aufast.nn import AdaptiveGraphGRU

STEPS = 12  # of five minutes: what is read, and what is forecast


def generated_traffic(nodes: int, steps: int, seed: int = 0) -> Tensor:
    """A generated series (steps, nodes) with zero mean and unit deviation."""
    generator = torch.Generator().manual_seed(seed)
    hours = torch.arange(steps) / 12
    phase = torch.rand(nodes, generator=generator) * 3
    daily = torch.sin((hours[:, None] - phase) * (2 * math.pi / 24))  # (steps, nodes)
    jam, jams = torch.zeros(nodes), []
    for _ in range(steps):
        starts = (torch.rand(nodes, generator=generator) < 0.01).float()
        jam = 0.7 * jam + 0.25 * jam.roll(1) + starts
        jams.append(jam)
    series = daily - torch.stack(jams) + 0.05 * torch.randn(steps, nodes, generator=generator)
    return (series - series.mean()) / series.std()


class Forecaster(nn.Module):
    """Two recurrent layers with one embedding, and a linear map to the whole horizon: AGCRN's model."""

    def __init__(self, nodes: int, hidden: int = 32, embedding: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(
            AdaptiveGraphGRU(width, hidden, nodes, embedding) for width in (1, hidden)
        )
        self.layers[1].node_embeddings = self.layers[0].node_embeddings  # one graph for both
        self.head = nn.Linear(hidden, STEPS)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, STEPS, nodes) -> the next STEPS values (B, STEPS, nodes)."""
        states = x.unsqueeze(-1)  # (B, T, N, 1)
        for layer in self.layers:
            states, last = layer(states)  # (B, T, N, c), (B, N, c)
        return self.head(last).transpose(1, 2)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=48)
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    series = generated_traffic(options.nodes, 1500)
    windows = series.unfold(0, 2 * STEPS, 1).transpose(1, 2)  # (W, 2·STEPS, N)
    train, test = windows[:1200], windows[1300::STEPS]
    model = Forecaster(options.nodes)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(options.iterations):
        batch = train[torch.randint(len(train), (16,))]
        loss = F.l1_loss(model(batch[:, :STEPS]), batch[:, STEPS:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        error = F.l1_loss(model(test[:, :STEPS]), test[:, STEPS:]).item()
    last_value = F.l1_loss(test[:, STEPS - 1 : STEPS].expand(-1, STEPS, -1), test[:, STEPS:]).item()
    print(f"mean absolute error on generated data: {error:.3f}; repeating the last value: {last_value:.3f}")
    return error, last_value


if __name__ == "__main__":
    main()
