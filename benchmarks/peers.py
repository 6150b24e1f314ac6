"""The strongest ways to compute each operator without aufast's kernels, each equal to the reference.

Arguments and results are those of `aufast.reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from aufast.reference.graph_conv import global_adjacency, softmax_supports
from aufast.reference.roi_crop import box_theta


def roi_crop_stn(features: Tensor, boxes: Tensor, size: tuple[int, int] = (6, 6)) -> Tensor:
    """The textbook spatial transformer: a copy of the feature map a region, `affine_grid`, `grid_sample`."""
    batch, channels, height, width = features.shape
    regions = boxes.shape[1]
    theta = box_theta(boxes, height, width).flatten(0, 1)  # (B*R, 2, 3)
    grid = F.affine_grid(theta, [batch * regions, channels, *size], align_corners=False)  # (B*R, h, w, 2)
    copies = features.repeat_interleave(regions, dim=0)  # (B*R, C, H, W)
    crops = F.grid_sample(copies, grid, align_corners=False)  # (B*R, C, h, w)
    return crops.unflatten(0, (batch, regions))  # (B, R, C, h, w)


def roi_crop_merged(features: Tensor, boxes: Tensor, size: tuple[int, int] = (6, 6)) -> Tensor:
    """All regions of an image as one tall grid: one `grid_sample`, no copy of features or crops."""
    batch, channels, height, width = features.shape
    regions = boxes.shape[1]
    theta = box_theta(boxes, height, width).flatten(0, 1)  # (B*R, 2, 3)
    grid = F.affine_grid(theta, [batch * regions, channels, *size], align_corners=False)  # (B*R, h, w, 2)
    grid = grid.view(batch, regions * size[0], size[1], 2)  # (B, R*h, w, 2)
    crops = F.grid_sample(features, grid, align_corners=False)  # (B, C, R*h, w)
    return crops.unflatten(2, (regions, size[0])).transpose(1, 2)  # (B, R, C, h, w)


def mixing(U: Tensor) -> Tensor:
    """`S = I + N(R(U Uᵀ))`, (m, m)."""
    return torch.eye(len(U), dtype=U.dtype, device=U.device) + global_adjacency(U)


def node_weights(Q: Tensor, W: Tensor) -> Tensor:
    """`Θ = Q W`, (m, cin, cout), as one matrix product."""
    return (Q @ W.flatten(1)).unflatten(1, W.shape[1:])


def graph_conv_hoisted(x: Tensor, U: Tensor, Q: Tensor, W: Tensor) -> Tensor:
    """S and Θ once, the node mix as one product batched over frames, the node maps as one over nodes."""
    mixed = torch.matmul(mixing(U), x.flatten(0, -3))  # (N, m, cin)
    out = torch.bmm(mixed.transpose(0, 1), node_weights(Q, W))  # (m, N, cout)
    return out.transpose(0, 1).unflatten(0, x.shape[:-2])  # (..., m, cout)


def graph_gru_hoisted(
    x: Tensor, U: Tensor, Q: Tensor, W_z: Tensor, W_r: Tensor, W_h: Tensor
) -> tuple[Tensor, Tensor]:
    """S, Θ and the input half of every gate for all steps at once, then a lean loop: eight calls a step."""
    batch, steps, nodes, cin = x.shape
    c = W_z.shape[-1]
    S = mixing(U)
    theta = torch.cat([node_weights(Q, W) for W in (W_z, W_r, W_h)], dim=-1)  # (m, c + cin, 3c)
    rows = x.permute(2, 1, 0, 3).reshape(nodes, -1)  # (m, T*B*cin)
    mixed = (S @ rows).view(nodes, -1, cin)  # (m, T*B, cin)
    gates = torch.bmm(mixed, theta[:, c:]).view(nodes, steps, batch, 3 * c)
    gates_zr, gates_h = gates.split([2 * c, c], dim=-1)
    theta_zr, theta_h = theta[:, :c, : 2 * c].contiguous(), theta[:, :c, 2 * c :].contiguous()
    h = x.new_zeros(nodes, batch, c)
    states = []
    for in_zr, in_h in zip(gates_zr.unbind(1), gates_h.unbind(1), strict=True):
        mixed_h = (S @ h.view(nodes, -1)).view(h.shape)  # (m, B, c)
        z, r = torch.baddbmm(in_zr, mixed_h, theta_zr).sigmoid_().chunk(2, dim=-1)  # (m, B, c) each
        mixed_r = (S @ (r * h).view(nodes, -1)).view(h.shape)
        candidate = torch.baddbmm(in_h, mixed_r, theta_h).tanh_()
        h = torch.lerp(candidate, h, z)
        states.append(h)
    return torch.stack(states).permute(2, 0, 1, 3), h.transpose(0, 1)  # (B, T, m, c), (B, m, c)


def agcrn_hoisted(
    x: Tensor, E: Tensor, gate_weights: Tensor, gate_bias: Tensor, update_weights: Tensor, update_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """AGCRN's layer with supports, Θ and the input half of every gate made once, and a lean loop."""
    batch, steps, nodes, cin = x.shape
    c, order = update_bias.shape[-1], gate_weights.shape[1]
    S = softmax_supports(E, order)[1:].reshape(-1, nodes)  # ((K-1)·N, N)
    theta = node_weights(E, torch.cat([gate_weights, update_weights], dim=-1))  # (N, K, cin + c, 3c)
    theta_x, theta_h = theta[:, :, :cin].flatten(1, 2), theta[:, :, cin:].flatten(1, 2)
    theta_zr, theta_c = theta_h[..., : 2 * c].contiguous(), theta_h[..., 2 * c :].contiguous()
    bias = E @ torch.cat([gate_bias, update_bias], dim=-1)  # (N, 3c)

    def mix(rows: Tensor) -> Tensor:  # (N, R, width) -> (N, R, K·width)
        mixed = (S @ rows.flatten(1)).view(order - 1, *rows.shape)
        return torch.cat([rows[None], mixed]).permute(1, 2, 0, 3).flatten(2)

    rows = x.permute(2, 1, 0, 3).reshape(nodes, -1, cin)  # (N, T·B, cin)
    gates = torch.baddbmm(bias[:, None], mix(rows), theta_x).view(nodes, steps, batch, 3 * c)
    gates_zr, gates_c = gates.split([2 * c, c], dim=-1)
    h = x.new_zeros(nodes, batch, c)
    states = []
    for in_zr, in_c in zip(gates_zr.unbind(1), gates_c.unbind(1), strict=True):
        z, r = torch.baddbmm(in_zr, mix(h), theta_zr).sigmoid().chunk(2, dim=-1)  # (N, B, c) each
        candidate = torch.baddbmm(in_c, mix(z * h), theta_c).tanh()
        h = torch.lerp(candidate, h, r)
        states.append(h)
    return torch.stack(states).permute(2, 0, 1, 3), h.transpose(0, 1)  # (B, T, N, c), (B, N, c)


def _activated(x: Tensor, grid: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Every patch's folded BatchNorm and ReLU in one pass, as (B, C_in, n, h, n, w)."""
    patches = x.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # (B, C_in, n, h, n, w)
    scale, shift = (t.permute(2, 0, 1)[:, :, None, :, None] for t in (scale, shift))  # (C_in, n, 1, n, 1)
    return torch.addcmul(shift, patches, scale).relu_()


def region_conv_loop(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """One convolution a patch, after one activation of the whole map."""
    grid = weight.shape[0]
    patches = _activated(x, grid, scale, shift)
    rows = []
    for i in range(grid):
        row = [F.conv2d(patches[:, :, i, :, j], weight[i, j], bias[i, j], padding=1) for j in range(grid)]
        rows.append(torch.cat(row, dim=3))  # (B, C_out, h, W)
    return torch.cat(rows, dim=2)  # (B, C_out, H, W)


def region_conv_grouped(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The patches side by side as channels: one grouped convolution."""
    batch, _, height, width = x.shape
    grid = weight.shape[0]
    patches = _activated(x, grid, scale, shift).permute(0, 2, 4, 1, 3, 5)  # (B, n, n, C_in, h, w)
    groups = grid * grid
    out = F.conv2d(patches.flatten(1, 3), weight.flatten(0, 2), bias.flatten(), padding=1, groups=groups)
    out = out.unflatten(1, (grid, grid, -1)).permute(0, 3, 1, 4, 2, 5)  # (B, C_out, n, h, n, w)
    return out.reshape(batch, -1, height, width)


def compiled(function: Callable) -> Callable:
    """`torch.compile` with one program for each shape, compiled at the first call."""
    return torch.compile(function, dynamic=False, fullgraph=True)
