// The forward recurrence of the graph-GRU. Step t of a block (node i), AAR eq. (13):
//
//   published: h_{t-1} of every node
//   ── the group meets ──
//   φʰ = Σ_j S_ij h_j                              read from all blocks
//   z = σ(φʰ Θ_zʰ + gates_z), r = σ(φʰ Θ_rʰ + gates_r)
//   published: r ★ h_{t-1}
//   ── the group meets ──
//   φʳ = Σ_j S_ij (r ★ h)_j
//   h~ = tanh(φʳ Θ_hʰ + gates_h), h = z ★ h_{t-1} + (1 - z) ★ h~
//
// `gates` is the input half with its bias, of all steps, made before. A warp owns strips of eight channels
// and makes all three gates of them, so the state and z never leave it.
#pragma once

#include "graph_gru.cuh"

namespace {

template <class T>
struct Forward {
  Walk walk;
  const T* gates;   // (m, B, T, 3c)
  const float* h0;  // (B, m, c) or null
  T *out, *saved;   // (B, T, m, c); (B, T, m, 3c) or null
  float* h_last;    // (B, m, c)
};

template <class T>
struct ForwardRoom {
  size_t supports, state, update, mixed, exchange, theta, bytes;

  __host__ __device__ ForwardRoom(const Walk& w, int rows) {
    Carver carver;
    supports = carver.take<float>(w.order * w.nodes);
    state = carver.take<float>(rows * row_stride<float>(w.padded));
    update = carver.take<float>(rows * row_stride<float>(w.padded));
    mixed = carver.take<T>(rows * row_stride<T>(w.order * w.padded));
    exchange = carver.take<T>(w.clusters ? 2 * published(w, rows) : 0);
    theta = carver.take<unsigned char>(w.resident ? w.theta_bytes : 0);
    bytes = carver.used;
  }
  static __host__ __device__ int published(const Walk& w, int rows) { return rows * row_stride<T>(w.padded); }
};

// φ of this node, from what all nodes published: rows of K·c columns.
template <class Product>
__device__ void mix(const Walk& w, const Group<typename Product::T>& group, int buffer, const float* supports,
                    typename Product::T* mixed, int rows) {
  using T = typename Product::T;
  const int fours = w.padded / 4, inner = w.order * w.padded;
  for (int k = 0; k < w.order; ++k)
    for (int place = threadIdx.x; place < rows * fours; place += blockDim.x) {
      const int row = place / fours, channel = place % fours * 4;
      Values<4> sum =
          group.weighted_sum(buffer, row * row_stride<T>(w.padded) + channel, supports + k * w.nodes);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.x[i] = Product::narrow(sum.x[i]);
      store<4>(mixed + row * row_stride<T>(inner) + k * w.padded + channel, sum);
    }
}

// A block at work on a tile of sequences: what it holds in shared memory, and the parts of a step.
template <class Product, int kHalves>
struct ForwardBlock {
  using T = typename Product::T;
  static constexpr int kRows = 8 * kHalves;

  const Forward<T>& a;
  const Walk& w;
  const ForwardRoom<T> room;
  float *supports, *state, *update;
  T* mixed;
  Group<T> group;
  const int node, c, inner, state_stride, published_stride;
  const unsigned char *theta, *theta_candidate;
  int64_t first = 0;      // of the tile's sequences
  int rows = 0;           // how many
  int64_t ends[kHalves];  // the steps of the lane's sequences

  __device__ ForwardBlock(const Forward<T>& arguments, unsigned char* memory)
      : a(arguments),
        w(a.walk),
        room(w, kRows),
        supports(reinterpret_cast<float*>(memory + room.supports)),
        state(reinterpret_cast<float*>(memory + room.state)),
        update(reinterpret_cast<float*>(memory + room.update)),
        mixed(reinterpret_cast<T*>(memory + room.mixed)),
        group(w, reinterpret_cast<T*>(memory + room.exchange), room.published(w, kRows)),
        node(group.node),
        c(w.channels),
        inner(w.order * w.padded),
        state_stride(row_stride<float>(w.padded)),
        published_stride(row_stride<T>(w.padded)),
        theta(take_theta(w, node, memory + room.theta)),
        theta_candidate(theta + w.padded / 8 * strip_bytes<T>(2, inner)) {
    for (int j = threadIdx.x; j < w.order * w.nodes; j += blockDim.x)
      supports[j] = w.supports[node * w.order * w.nodes + j];
    clear(mixed, kRows * row_stride<T>(inner));
  }

  // Takes a tile and publishes its first state; channels beyond c are zero, and stay so.
  __device__ void begin(int64_t first_sequence) {
    first = first_sequence;
    rows = static_cast<int>(min(static_cast<int64_t>(w.rows), w.batch - first));
    for (int place = threadIdx.x; place < rows * (w.padded / 4); place += blockDim.x) {
      const int row = place / (w.padded / 4), channel = place % (w.padded / 4) * 4;
      Values<4> h = {};
      if (a.h0 != nullptr) h = load_row<4>(a.h0 + ((first + row) * w.nodes + node) * c, channel, c, w.whole);
      store<4>(state + row * state_stride + channel, h);
      store<4>(group.mine(0) + row * published_stride + channel, h);
    }
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int row = 8 * i + lane_row();
      ends[i] = w.lengths == nullptr || row >= rows ? w.steps : w.lengths[first + row];
    }
  }

  // The input half of a sequence's gates.
  __device__ const T* given_gates(int64_t b, int64_t t) const {
    return a.gates + ((node * w.batch + b) * w.steps + t) * 3 * c;
  }

  // z and r from φʰ; z is kept, r ★ h_{t-1} published.
  __device__ void make_gates(int64_t t) {
    T* published = group.mine(1);
    for (int strip = threadIdx.x / 32; strip < w.padded / 8; strip += blockDim.x / 32) {
      const int column = 8 * strip + 2 * lane_column();
      Values<2> given[2][kHalves] = {};
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        if (8 * i + lane_row() >= rows) continue;
        const T* gates = given_gates(first + 8 * i + lane_row(), t);
        for (int gate = 0; gate < 2; ++gate)
          given[gate][i] = load_row<2>(gates + gate * c, column, c, w.whole);
      }
      float sum[2][kHalves][2] = {};
      multiply_strip<Product>(sum, mixed, row_stride<T>(inner), theta + strip * strip_bytes<T>(2, inner),
                              inner);
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        const int row = 8 * i + lane_row();
        if (row >= rows) continue;
        const int64_t b = first + row;
        Values<2> z, r, reset;
        const Values<2> h = load<2>(state + row * state_stride + column);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          z.x[e] = sigmoid(sum[0][i][e] + given[0][i].x[e]);
          r.x[e] = sigmoid(sum[1][i][e] + given[1][i].x[e]);
          reset.x[e] = r.x[e] * h.x[e];
        }
        store<2>(update + row * state_stride + column, z);
        store<2>(published + row * published_stride + column, reset);
        if (a.saved == nullptr) continue;
        T* saved = a.saved + ((b * w.steps + t) * w.nodes + node) * 3 * c;
        store_row<2>(saved, column, c, w.whole, z);
        store_row<2>(saved + c, column, c, w.whole, r);
      }
    }
  }

  // h~ from φʳ, and the state, which is published.
  __device__ void make_state(int64_t t) {
    T* published = group.mine(0);
    for (int strip = threadIdx.x / 32; strip < w.padded / 8; strip += blockDim.x / 32) {
      const int column = 8 * strip + 2 * lane_column();
      Values<2> given[kHalves] = {};
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        if (8 * i + lane_row() >= rows) continue;
        const T* gates = given_gates(first + 8 * i + lane_row(), t);
        given[i] = load_row<2>(gates + 2 * c, column, c, w.whole);
        if (t + 1 < w.steps)
          for (int gate = 0; gate < 3; ++gate) prefetch(gates + (3 + gate) * c + min(column, c - 1));
      }
      float sum[1][kHalves][2] = {};
      multiply_strip<Product>(sum, mixed, row_stride<T>(inner),
                              theta_candidate + strip * strip_bytes<T>(1, inner), inner);
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        const int row = 8 * i + lane_row();
        if (row >= rows) continue;
        const int64_t b = first + row;
        Values<2> candidate, shown;
        Values<2> h = load<2>(state + row * state_stride + column);
        const Values<2> z = load<2>(update + row * state_stride + column);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          candidate.x[e] = tanhf(sum[0][i][e] + given[i].x[e]);
          const float next = z.x[e] * h.x[e] + (1.0f - z.x[e]) * candidate.x[e];
          shown.x[e] = t < ends[i] ? next : 0.0f;
          h.x[e] = t < ends[i] ? next : h.x[e];
        }
        store<2>(state + row * state_stride + column, h);
        store<2>(published + row * published_stride + column, h);
        const int64_t place = (b * w.steps + t) * w.nodes + node;
        store_row<2>(a.out + place * c, column, c, w.whole, shown);
        if (a.saved != nullptr) store_row<2>(a.saved + place * 3 * c + 2 * c, column, c, w.whole, candidate);
        if (t + 1 == w.steps) store_row<2>(a.h_last + (b * w.nodes + node) * c, column, c, w.whole, h);
      }
    }
  }
};

template <class Product, int kHalves>
__global__ void __launch_bounds__(kMostThreads, 1)
    graph_gru_forward(const __grid_constant__ Forward<typename Product::T> a) {
  const Walk& w = a.walk;
  ForwardBlock<Product, kHalves> block(a, shared_memory());
  Group<typename Product::T>& group = block.group;
  for (int64_t first = static_cast<int64_t>(group.index) * w.rows; first < w.batch;
       first += static_cast<int64_t>(w.groups) * w.rows) {
    block.begin(first);
    for (int64_t t = 0; t < w.steps; ++t) {
      group.sync();
      mix<Product>(w, group, 0, block.supports, block.mixed, block.rows);
      __syncthreads();
      block.make_gates(t);
      group.sync();
      mix<Product>(w, group, 1, block.supports, block.mixed, block.rows);
      __syncthreads();
      block.make_state(t);
    }
    __syncthreads();  // the next tile's first state is written by other threads
  }
  // Nobody leaves while others may still read what it published.
  if (w.clusters) cluster_sync();
}

}  // namespace
