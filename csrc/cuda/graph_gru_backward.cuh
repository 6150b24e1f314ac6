// The backward recurrence of the graph-GRU, from the last step to the first. Step t of a block (node i), in
// the names of docs/operators/graph_gru.md:
//
//   dh += gradient of the output; α_h, α_z from dh; dh ← dh ★ z
//   published: γʳ = α_h Θ_hʰᵀ
//   ── the group meets ──
//   d(r ★ h) = Σ_j S_ji γʳ_j                       read from all blocks
//   α_r = d(r ★ h) ★ h_{t-1} ★ r ★ (1 - r); dh += d(r ★ h) ★ r
//   published: γʰ = (α_z α_r) (Θ_zʰ Θ_rʰ)ᵀ
//   ── the group meets ──
//   dh += Σ_j S_ji γʰ_j
//
// The α are the result, of which everything else is made afterwards, for all steps at once. A thread owns
// fours of channels, so dh never leaves it.
#pragma once

#include "graph_gru.cuh"

namespace {

template <class T>
struct Backward {
  Walk walk;
  const T *grad_out, *out, *saved;  // (B, T, m, c), (B, T, m, c), (B, T, m, 3c)
  const float *h0, *grad_h_last;    // (B, m, c), the first or null
  T* d_gates;                       // (m, B, T, 3c)
  float* d_h0;                      // (B, m, c)
};

template <class T>
struct BackwardRoom {
  size_t supports, d_state, d_candidate, d_gates, exchange, theta, bytes;

  __host__ __device__ BackwardRoom(const Walk& w, int rows) {
    Carver carver;
    supports = carver.take<float>(w.order * w.nodes);
    d_state = carver.take<float>(rows * row_stride<float>(w.padded));
    d_candidate = carver.take<T>(rows * row_stride<T>(w.padded));
    d_gates = carver.take<T>(rows * row_stride<T>(2 * w.padded));
    exchange = carver.take<T>(w.clusters ? 2 * published(w, rows) : 0);
    theta = carver.take<unsigned char>(w.resident ? w.theta_bytes : 0);
    bytes = carver.used;
  }
  static __host__ __device__ int published(const Walk& w, int rows) {
    return rows * row_stride<T>(w.order * w.padded);
  }
};

// What a place (four channels of a row) reads of its step, and where in the arrays it lies.
template <class T>
struct Place {
  int row, channel;
  int64_t b, step;  // step: (b, t, node) in (B, T, m)
  bool running;

  __device__ Place(const Backward<T>& a, int place, int64_t first, int64_t t, int node) {
    const Walk& w = a.walk;
    row = place / (w.padded / 4), channel = place % (w.padded / 4) * 4;
    b = first + row, step = (b * w.steps + t) * w.nodes + node;
    running = w.lengths == nullptr || t < w.lengths[b];
  }

  __device__ Values<4> read(const Backward<T>& a, const T* array, int width, int part) const {
    return load_row<4>(array + (step * width + part) * a.walk.channels, channel, a.walk.channels,
                       a.walk.whole);
  }

  __device__ Values<4> state_before(const Backward<T>& a, int64_t t, int node) const {
    const Walk& w = a.walk;
    if (t > 0) return load_row<4>(a.out + (step - w.nodes) * w.channels, channel, w.channels, w.whole);
    if (a.h0 == nullptr) return {};
    return load_row<4>(a.h0 + (b * w.nodes + node) * w.channels, channel, w.channels, w.whole);
  }

  // Brings what the step before will read near; t > 0.
  __device__ void expect_step_before(const Backward<T>& a) const {
    const Walk& w = a.walk;
    const int64_t at = (step - w.nodes) * w.channels, part = min(channel, w.channels - 1);
    for (int gate = 0; gate < 3; ++gate) prefetch(a.saved + 3 * at + gate * w.channels + part);
    prefetch(a.grad_out + at + part);
    if (at >= w.nodes * w.channels) prefetch(a.out + at - w.nodes * w.channels + part);
  }

  __device__ void write(const Backward<T>& a, int64_t t, int node, int gate, const Values<4>& alpha) const {
    const Walk& w = a.walk;
    T* to = a.d_gates + (((node * w.batch + b) * w.steps + t) * 3 + gate) * w.channels;
    store_row<4>(to, channel, w.channels, w.whole, alpha);
  }
};

// Publishes rows · Θᵀ, K·c columns of it.
template <class Product, int kHalves>
__device__ void publish_product(const Walk& w, const typename Product::T* rows, int depth,
                                const unsigned char* theta, typename Product::T* published, int count) {
  using T = typename Product::T;
  const int columns = w.order * w.padded;
  for (int strip = threadIdx.x / 32; strip < columns / 8; strip += blockDim.x / 32) {
    float sum[1][kHalves][2] = {};
    multiply_strip<Product>(sum, rows, row_stride<T>(depth), theta + strip * strip_bytes<T>(1, depth), depth);
    const int column = 8 * strip + 2 * lane_column();
#pragma unroll
    for (int i = 0; i < kHalves; ++i)
      if (8 * i + lane_row() < count)
        store<2>(published + (8 * i + lane_row()) * row_stride<T>(columns) + column,
                 Values<2>{{sum[0][i][0], sum[0][i][1]}});
  }
}

// Σ_jk S_k(j, i) · published by node j, of support k.
template <class T>
__device__ Values<4> mix_back(const Walk& w, const Group<T>& group, int buffer, const float* supports,
                              int row, int channel) {
  Values<4> total = {};
  for (int k = 0; k < w.order; ++k) {
    const int offset = row * row_stride<T>(w.order * w.padded) + k * w.padded + channel;
    const Values<4> sum = group.weighted_sum(buffer, offset, supports + k * w.nodes);
#pragma unroll
    for (int i = 0; i < 4; ++i) total.x[i] += sum.x[i];
  }
  return total;
}

// A block at work on a tile of sequences: what it holds in shared memory, and the parts of a step.
template <class Product, int kHalves>
struct BackwardBlock {
  using T = typename Product::T;
  static constexpr int kRows = 8 * kHalves;

  const Backward<T>& a;
  const Walk& w;
  const BackwardRoom<T> room;
  float *supports, *d_state;
  T *d_candidate, *d_gates;
  Group<T> group;
  const int node, c, padded, state_stride;
  const unsigned char *theta, *theta_gates;
  int64_t first = 0;         // of the tile's sequences
  int rows = 0, places = 0;  // how many; fours of channels in their rows

  __device__ BackwardBlock(const Backward<T>& arguments, unsigned char* memory)
      : a(arguments),
        w(a.walk),
        room(w, kRows),
        supports(reinterpret_cast<float*>(memory + room.supports)),
        d_state(reinterpret_cast<float*>(memory + room.d_state)),
        d_candidate(reinterpret_cast<T*>(memory + room.d_candidate)),
        d_gates(reinterpret_cast<T*>(memory + room.d_gates)),
        group(w, reinterpret_cast<T*>(memory + room.exchange), room.published(w, kRows)),
        node(group.node),
        c(w.channels),
        padded(w.padded),
        state_stride(row_stride<float>(padded)),
        theta(take_theta(w, node, memory + room.theta)),
        theta_gates(theta + w.order * padded / 8 * strip_bytes<T>(1, padded)) {
    for (int j = threadIdx.x; j < w.order * w.nodes; j += blockDim.x)
      supports[j] = w.supports[(j % w.nodes * w.order + j / w.nodes) * w.nodes + node];
    clear(d_candidate, kRows * row_stride<T>(padded));
    clear(d_gates, kRows * row_stride<T>(2 * padded));
  }

  __device__ float* d_state_at(const Place<T>& here) const {
    return d_state + here.row * state_stride + here.channel;
  }

  // Takes a tile: dh is the gradient of the last state.
  __device__ void begin(int64_t first_sequence) {
    first = first_sequence;
    rows = static_cast<int>(min(static_cast<int64_t>(w.rows), w.batch - first));
    places = rows * (padded / 4);
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const Place<T> here(a, place, first, 0, node);
      store<4>(d_state_at(here),
               load_row<4>(a.grad_h_last + (here.b * w.nodes + node) * c, here.channel, c, w.whole));
    }
  }

  // α_z and α_h from dh, of which dh ★ z is left.
  __device__ void make_update_and_candidate(int64_t t) {
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const Place<T> here(a, place, first, t, node);
      if (t > 0) here.expect_step_before(a);
      Values<4> alpha_z = {}, alpha_h = {};
      if (here.running) {
        const Values<4> z = here.read(a, a.saved, 3, 0), candidate = here.read(a, a.saved, 3, 2);
        const Values<4> given = here.read(a, a.grad_out, 1, 0), before = here.state_before(a, t, node);
        Values<4> dh = load<4>(d_state_at(here));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float d = dh.x[i] + given.x[i], kept = 1.0f - z.x[i];
          alpha_z.x[i] = d * (before.x[i] - candidate.x[i]) * z.x[i] * kept;
          alpha_h.x[i] = d * kept * (1.0f - candidate.x[i] * candidate.x[i]);
          dh.x[i] = d * z.x[i];
        }
        store<4>(d_state_at(here), dh);
      }
      here.write(a, t, node, 0, alpha_z);
      here.write(a, t, node, 2, alpha_h);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        alpha_z.x[i] = Product::narrow(alpha_z.x[i]), alpha_h.x[i] = Product::narrow(alpha_h.x[i]);
      store<4>(d_gates + here.row * row_stride<T>(2 * padded) + here.channel, alpha_z);
      store<4>(d_candidate + here.row * row_stride<T>(padded) + here.channel, alpha_h);
    }
  }

  // α_r from d(r ★ h), of which dh gets the part of h.
  __device__ void make_reset(int64_t t) {
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const Place<T> here(a, place, first, t, node);
      Values<4> alpha_r = {};
      if (here.running) {
        const Values<4> r = here.read(a, a.saved, 3, 1), before = here.state_before(a, t, node);
        const Values<4> d_reset = mix_back(w, group, 0, supports, here.row, here.channel);
        Values<4> dh = load<4>(d_state_at(here));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          alpha_r.x[i] = d_reset.x[i] * before.x[i] * r.x[i] * (1.0f - r.x[i]);
          dh.x[i] += d_reset.x[i] * r.x[i];
        }
        store<4>(d_state_at(here), dh);
      }
      here.write(a, t, node, 1, alpha_r);
#pragma unroll
      for (int i = 0; i < 4; ++i) alpha_r.x[i] = Product::narrow(alpha_r.x[i]);
      store<4>(d_gates + here.row * row_stride<T>(2 * padded) + padded + here.channel, alpha_r);
    }
  }

  // What reaches h_{t-1} through z and r of all nodes.
  __device__ void add_through_gates(int64_t t) {
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const Place<T> here(a, place, first, t, node);
      if (!here.running) continue;
      const Values<4> sum = mix_back(w, group, 1, supports, here.row, here.channel);
      Values<4> dh = load<4>(d_state_at(here));
#pragma unroll
      for (int i = 0; i < 4; ++i) dh.x[i] += sum.x[i];
      store<4>(d_state_at(here), dh);
    }
  }

  // What is left of dh is the first state's gradient.
  __device__ void end() {
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const Place<T> here(a, place, first, 0, node);
      store_row<4>(a.d_h0 + (here.b * w.nodes + node) * c, here.channel, c, w.whole,
                   load<4>(d_state_at(here)));
    }
  }
};

template <class Product, int kHalves>
__global__ void __launch_bounds__(kMostThreads, 1)
    graph_gru_backward(const __grid_constant__ Backward<typename Product::T> a) {
  const Walk& w = a.walk;
  BackwardBlock<Product, kHalves> block(a, shared_memory());
  Group<typename Product::T>& group = block.group;
  __syncthreads();
  for (int64_t first = static_cast<int64_t>(group.index) * w.rows; first < w.batch;
       first += static_cast<int64_t>(w.groups) * w.rows) {
    block.begin(first);
    for (int64_t t = w.steps - 1; t >= 0; --t) {
      block.make_update_and_candidate(t);
      __syncthreads();
      publish_product<Product, kHalves>(w, block.d_candidate, w.padded, block.theta, group.mine(0),
                                        block.rows);
      group.sync();
      block.make_reset(t);
      __syncthreads();
      publish_product<Product, kHalves>(w, block.d_gates, 2 * w.padded, block.theta_gates, group.mine(1),
                                        block.rows);
      group.sync();
      block.add_through_gates(t);
    }
    block.end();
  }
  // Nobody leaves while others may still read what it published.
  if (w.clusters) cluster_sync();
}

}  // namespace
