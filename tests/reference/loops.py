"""Each operator once more, as slow loops over numbers in float64: an independent reading of what it means."""

from __future__ import annotations

import math

import numpy as np


def pixel_value(image: np.ndarray, x: float, y: float) -> float:
    """Bilinear value of image (H, W) at pixel coordinates, where pixel (0, 0) is at (0, 0); zero outside."""
    height, width = image.shape
    value = 0.0
    for row in range(height):
        for column in range(width):
            weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))  # a tent around each pixel
            if weight:
                value += weight * image[row, column]
    return value


def box_position(start: float, end: float, k: int, count: int) -> float:
    """Pixel coordinate of sample k of `count` between two edges; pixel i covers [i, i+1), its middle is i."""
    return start + (end - start) * (k + 0.5) / count - 0.5


def theta_position(theta: np.ndarray, u: int, v: int, size: tuple, map_size: tuple, align_corners: bool):
    """Pixel coordinates (x, y) of output pixel (u, v) under the affine matrix theta (2, 3)."""

    def normal(k: int, count: int) -> float:
        if align_corners:
            return -1 + 2 * k / (count - 1) if count > 1 else 0.0
        return (2 * k + 1) / count - 1

    def pixel(coordinate: float, count: int) -> float:
        return (coordinate + 1) / 2 * (count - 1) if align_corners else ((coordinate + 1) * count - 1) / 2

    h, w = size
    height, width = map_size
    x_hat, y_hat = normal(u, w), normal(v, h)
    x = theta[0, 0] * x_hat + theta[0, 1] * y_hat + theta[0, 2]
    y = theta[1, 0] * x_hat + theta[1, 1] * y_hat + theta[1, 2]
    return pixel(x, width), pixel(y, height)


def roi_crop(features: np.ndarray, rois: np.ndarray, size: tuple, align_corners: bool = False) -> np.ndarray:
    batch, channels, *map_size = features.shape
    regions, (h, w) = rois.shape[1], size
    out = np.zeros((batch, regions, channels, h, w))
    for b in range(batch):
        for n in range(regions):
            roi = rois[b, n]
            for v in range(h):
                for u in range(w):
                    for c in range(channels):
                        if not np.isfinite(roi).all():
                            out[b, n, c, v, u] = math.nan
                            continue
                        if roi.shape == (4,):
                            x = box_position(roi[0], roi[2], u, w)
                            y = box_position(roi[1], roi[3], v, h)
                        else:
                            x, y = theta_position(roi, u, v, size, map_size, align_corners)
                        out[b, n, c, v, u] = pixel_value(features[b, c], x, y)
    return out


def dot(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for left, right in zip(a, b, strict=True):
        total += float(left) * float(right)
    return total


def adjacency(U: np.ndarray) -> np.ndarray:
    """N(R(U Uᵀ)), where N divides by the sum over all entries and N(0) = 0."""
    m = len(U)
    A = np.zeros((m, m))
    total = 0.0
    for i in range(m):
        for j in range(m):
            A[i, j] = max(0.0, dot(U[i], U[j]))
            total += A[i, j]
    if total > 0:
        for i in range(m):
            for j in range(m):
                A[i, j] /= total
    return A


def row_softmax(E: np.ndarray) -> np.ndarray:
    """softmax(relu(E Eᵀ)) over each row."""
    m = len(E)
    A = np.zeros((m, m))
    for i in range(m):
        exponentials = [math.exp(max(0.0, dot(E[i], E[j]))) for j in range(m)]
        for j in range(m):
            A[i, j] = exponentials[j] / math.fsum(exponentials)
    return A


def matrix_product(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    out = np.zeros((A.shape[0], B.shape[1]))
    for i in range(A.shape[0]):
        for j in range(B.shape[1]):
            out[i, j] = dot(A[i], B[:, j])
    return out


def supports(U: np.ndarray, normalization: str, order: int) -> list[np.ndarray]:
    """The matrices that mix the nodes: [I + N] for "global", [I, A, 2A·A - I, …] for "softmax"."""
    identity = np.eye(len(U))
    if normalization == "global":
        return [identity + adjacency(U)]
    A = row_softmax(U)
    found = [identity, A]
    while len(found) < order:
        found.append(2 * matrix_product(A, found[-1]) - found[-2])
    return found[:order]


def graph_conv(x, U, Q, W, bias=None, normalization: str = "global") -> np.ndarray:
    """x (N, m, cin) → (N, m, cout): node i's output b is Σ_k Σ_j S_k[i, j] Σ_a x[j, a] Θ_i[k, a, b]."""
    if normalization == "global":
        W = W[..., None, :, :]  # one support
    order, cin, cout = W.shape[-3:]
    S = supports(U, normalization, order)
    samples, m, _ = x.shape
    out = np.zeros((samples, m, cout))
    for s in range(samples):
        for i in range(m):
            for b in range(cout):
                total = 0.0
                for k in range(order):
                    for a in range(cin):
                        mixed = dot(S[k][i], x[s, :, a])
                        theta = W[k, a, b] if Q is None else dot(Q[i], W[:, k, a, b])
                        total += mixed * theta
                if bias is not None:
                    total += bias[b] if Q is None else dot(Q[i], bias[:, b])
                out[s, i, b] = total
    return out


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def graph_gru(x, U, Q, W_z, W_r, W_h, h0=None, biases=None, lengths=None, normalization: str = "global"):
    """x (B, T, m, c_in) → states (B, T, m, c) and the last state of each sequence (B, m, c)."""
    batch, steps, m, _ = x.shape
    c = W_z.shape[-1]
    b_z, b_r, b_h = biases or (None, None, None)
    out = np.zeros((batch, steps, m, c))
    last = np.zeros((batch, m, c))
    for b in range(batch):
        h = np.zeros((m, c)) if h0 is None else h0[b].copy()
        for t in range(steps if lengths is None else min(steps, int(lengths[b]))):
            joined = np.concatenate([h, x[b, t]], axis=1)[None]  # (1, m, c + c_in)
            z = graph_conv(joined, U, Q, W_z, b_z, normalization)[0]
            r = graph_conv(joined, U, Q, W_r, b_r, normalization)[0]
            kept = h.copy()
            for i in range(m):
                for a in range(c):
                    kept[i, a] *= sigmoid(r[i, a])
            reset = np.concatenate([kept, x[b, t]], axis=1)[None]
            candidate = graph_conv(reset, U, Q, W_h, b_h, normalization)[0]
            for i in range(m):
                for a in range(c):
                    gate = sigmoid(z[i, a])
                    h[i, a] = gate * h[i, a] + (1 - gate) * math.tanh(candidate[i, a])
            out[b, t] = h
        last[b] = h
    return out, last


def region_conv(x, weight, bias=None, scale=None, shift=None) -> np.ndarray:
    """x (B, C_in, H, W): a pixel sees only the neighbours that lie in its own patch of the n×n grid."""
    batch, channels, height, width = x.shape
    grid, _, filters = weight.shape[:3]
    patch_h, patch_w = height // grid, width // grid
    out = np.zeros((batch, filters, height, width))
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                i, j = row // patch_h, column // patch_w
                for f in range(filters):
                    total = 0.0 if bias is None else float(bias[i, j, f])
                    for c in range(channels):
                        for dy in (-1, 0, 1):
                            for dx in (-1, 0, 1):
                                y, x_ = row + dy, column + dx
                                if y // patch_h != i or x_ // patch_w != j:
                                    continue
                                value = float(x[b, c, y, x_])
                                if scale is not None:
                                    value = max(0.0, value * scale[i, j, c] + shift[i, j, c])
                                total += value * weight[i, j, f, c, dy + 1, dx + 1]
                    out[b, f, row, column] = total
    return out


def agcrn_cell(x, state, E, gate_W, gate_b, update_W, update_b) -> np.ndarray:
    """One step of AGCRN's cell, x (B, m, c_in), state (B, m, c): input rows first, r keeps the state."""
    c = state.shape[-1]
    gates = graph_conv(np.concatenate([x, state], axis=-1), E, E, gate_W, gate_b, "softmax")
    gates = np.vectorize(sigmoid)(gates)
    z, r = gates[..., :c], gates[..., c:]
    candidate = graph_conv(np.concatenate([x, z * state], axis=-1), E, E, update_W, update_b, "softmax")
    return r * state + (1 - r) * np.tanh(candidate)
