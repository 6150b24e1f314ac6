"""AGCRN as other projects write it, for tests that replace its cells; plain PyTorch on purpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aufast.reference.agcrn import node_adaptive_conv


class Conv(nn.Module):
    def __init__(self, cin: int, cout: int, order: int, ce: int):
        super().__init__()
        self.weights_pool = nn.Parameter(torch.randn(ce, order, cin, cout) * 0.3)
        self.bias_pool = nn.Parameter(torch.randn(ce, cout) * 0.3)

    def forward(self, x: Tensor, E: Tensor) -> Tensor:
        return node_adaptive_conv(x, E, self.weights_pool, self.bias_pool)


class Cell(nn.Module):
    def __init__(self, nodes: int, cin: int, hidden: int, order: int = 2, ce: int = 3):
        super().__init__()
        self.node_num, self.hidden_dim = nodes, hidden
        self.gate = Conv(cin + hidden, 2 * hidden, order, ce)
        self.update = Conv(cin + hidden, hidden, order, ce)

    def forward(self, x: Tensor, state: Tensor, node_embeddings: Tensor) -> Tensor:
        z, r = torch.sigmoid(self.gate(torch.cat([x, state], -1), node_embeddings)).chunk(2, -1)
        candidate = torch.tanh(self.update(torch.cat([x, z * state], -1), node_embeddings))
        return r * state + (1 - r) * candidate

    def init_hidden_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.node_num, self.hidden_dim)


class StateFirst(Cell):
    """Another convention: state before input, and z keeps the state."""

    def forward(self, x: Tensor, state: Tensor, node_embeddings: Tensor) -> Tensor:
        z, r = torch.sigmoid(self.gate(torch.cat([state, x], -1), node_embeddings)).chunk(2, -1)
        candidate = torch.tanh(self.update(torch.cat([r * state, x], -1), node_embeddings))
        return z * state + (1 - z) * candidate


class Encoder(nn.Module):
    def __init__(self, nodes: int, cin: int, hidden: int, layers: int, cell: type[Cell] = Cell, **options):
        super().__init__()
        self.node_num, self.input_dim, self.num_layers = nodes, cin, layers
        widths = [cin, *[hidden] * (layers - 1)]
        self.dcrnn_cells = nn.ModuleList(cell(nodes, width, hidden, **options) for width in widths)

    def forward(self, x: Tensor, init_state: Tensor, node_embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
        assert x.shape[2] == self.node_num and x.shape[3] == self.input_dim
        last = []
        for cell, state in zip(self.dcrnn_cells, init_state, strict=True):
            states = []
            for t in range(x.shape[1]):
                state = cell(x[:, t], state, node_embeddings)
                states.append(state)
            last.append(state)
            x = torch.stack(states, dim=1)
        return x, last

    def init_hidden(self, batch: int) -> Tensor:
        return torch.stack([cell.init_hidden_state(batch) for cell in self.dcrnn_cells])


class Forecaster(nn.Module):
    """x (B, T, N, c_in) -> (B, horizon, N)."""

    def __init__(
        self, nodes: int = 7, cin: int = 1, hidden: int = 4, layers: int = 2, horizon: int = 3, **options
    ):
        super().__init__()
        self.node_embeddings = nn.Parameter(torch.randn(nodes, options.get("ce", 3)))
        self.encoder = Encoder(nodes, cin, hidden, layers, **options)
        self.end_conv = nn.Conv2d(1, horizon, kernel_size=(1, hidden))

    def forward(self, x: Tensor) -> Tensor:
        state = self.encoder.init_hidden(x.shape[0]).to(x.dtype)
        out, _ = self.encoder(x, state, self.node_embeddings)
        return self.end_conv(out[:, -1:]).squeeze(-1)


class StepByStep(nn.Module):
    """A single cell, stepped by its owner, as PyTorch Geometric Temporal's users do."""

    def __init__(self, cell: Cell):
        super().__init__()
        self.recurrent = cell
        self.E = nn.Parameter(torch.randn(cell.node_num, cell.gate.weights_pool.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        state = self.recurrent.init_hidden_state(x.shape[0]).to(x.dtype)
        for t in range(x.shape[1]):
            state = self.recurrent(x[:, t], state, self.E)
        return state
