// Graph-GRU over whole clips on the CPU, forward and backward: one call runs all steps.
//
// Supports and node matrices are made once. The input half of all gates is a product over all steps of a
// chunk, so that only the state half is left for the recurrence: two phases a step, the reset state being
// exchanged between them. The work is cut in one of two ways:
// - by sequences, where there are enough of them: each thread runs its own, and never meets another;
// - by nodes, for few sequences or matrices beyond one core's cache: each thread keeps its nodes' matrices,
// and a crew
//   (crew.h) goes through the phases together.
// With many nodes, mixing becomes a phase of its own, whose items are whole frames (graph_gru_whole.inc).
// The backward runs a chunk of steps in reverse the same way, keeping only the gates' gradients; then each
// node's weight gradients are one product over the chunk's rows, made by one thread in a fixed order. Nothing
// is atomic, and the result does not depend on the number of threads. docs/operators/graph_gru.md derives the
// backward.

#include "graph_common.h"
#include "graph_door.h"

namespace {

constexpr int64_t kForwardRows = 96;    // rows of an input-half product: sequences times steps of a chunk
constexpr int64_t kBackwardRows = 192;  // rows of a weight-gradient product
constexpr int64_t kMostSequences = 16;  // that a thread runs together
constexpr int64_t kFewSequences = 8;    // per thread (a tile of rows), below which threads share the nodes
constexpr int64_t kFewPairs = 4;    // the same where Θ is kept as pairs: half as many bytes to read a step
constexpr int64_t kManyNodes = 48;  // from here on frames are mixed whole
constexpr int64_t kWholeRows = 16;  // rows of a forward chunk then: its arrays hold them for every node
constexpr int64_t kWholeRowNodes = 1 << 16;  // rows times nodes of a backward chunk: about 70 MB in all
constexpr int64_t kGateNodes = 4;            // whose Θ of two gates stays in the second cache
constexpr int64_t kThetaNodes = 32;          // nodes for each member, whose grad Θ there is at a time
constexpr int64_t kMixItems = 4;             // items for each member, at least
constexpr int64_t kMixRows = 24;             // nodes of such an item, at least
constexpr int64_t kCacheBytes = 3 << 19;     // of a core, for the state's half of the node matrices

template <class T>
struct GruCall {
  Graph<T> graph;
  Thetas<T> thetas;  // pools: W_z, W_r, W_h, then their biases if there are any
  TransposedPool<T> transposed[3];
  int64_t batch, steps, inputs, live_inputs, channels, live_channels;
  int64_t chunk;             // steps
  bool by_sequences, whole;  // whole: frames are mixed whole (graph_gru_whole.inc)
  int64_t tile;              // sequences that run together
  const T *x, *h0;
  const uint16_t *low_x, *low_out, *low_grad_out;  // in place of those in T, in bfloat16
  uint16_t* low_grad_x;
  const int64_t* lengths;
  T *out, *h_last;
  // What the backward will need, null where nobody asks for it: z, r, h̃ (batch, steps, m, 3 channels); of a
  // whole graph φ of h and of r ★ h under the dense supports, (2, supports, m, kept_node). Or in bfloat16.
  T *saved, *kept;
  uint16_t *saved_low, *kept_low;
  // Backward: results, and arrays over the rows of a chunk.
  const T *grad_out, *grad_h_last;
  T *grad_x, *grad_h;
  bool want_theta, want_graph;
  T* alpha;                        // (m, rows, 3 channels)
  T *gamma_h, *gamma_r, *gamma_x;  // (K, rows, m, channels or inputs)
  T* reset;                        // (rows, m, channels)
  // Whole graphs: φ of a step's states (supports, m, mixed_node) and of a chunk's inputs (K, m,
  // mixed_x_node).
  T *mixed, *mixed_x;
  int64_t mixed_x_node;
  // Their backward: Sᵀ; a step's γ (supports, 2, batch, m, channels), gradient of r ★ h, and frames turned;
  // the gradient of φˣ's input, packed as φˣ is; the pools transposed, (ce, 3 pools).
  T *transposed_supports, *gamma, *grad_reset, *turned, *packed_grad_x, *transposed_pools;
  int64_t theta_nodes;  // whose grad Θ there is at a time
  T *zeros, *buffers, *scratch;
  int64_t zeros_size;
  int64_t buffer_size, scratch_size;  // of one member
  int64_t theta_scratch;              // the first part of its scratch: Θ of a group
  CrewSeat* seats;
  int64_t* finished;
  int members;

  int64_t frame() const { return graph.nodes * channels; }
  int64_t theta_rows() const { return live_channels + live_inputs; }
  int64_t pool_size() const { return graph.order * theta_rows() * channels; }  // of one embedding and gate
  // A node's share of the gates. One vector more than it needs keeps the nodes off each other's cache sets.
  int64_t gate_node(int64_t sequences) const { return sequences * chunk * 3 * channels + padded<T>(1); }
  int64_t mixed_node() const { return batch * channels + padded<T>(1); }
  int64_t kept_node() const { return steps * batch * channels + padded<T>(1); }
  int64_t kept_at(int half, int64_t support, int64_t node, int64_t t) const {
    return ((half * dense() + support) * graph.nodes + node) * kept_node() + t * batch * channels;
  }
  // Supports that are not the identity, as S_0 of softmax is.
  int64_t dense() const { return graph.order - (graph.softmax ? 1 : 0); }
  const T* dense_support(int64_t s) const { return graph.supports + (s + graph.softmax) * graph.matrix(); }
  T* dense_gradient(int64_t s) const { return graph.grad_supports + (s + graph.softmax) * graph.matrix(); }
  // The packed input: φˣ under the identity, or behind φˣ where there is none.
  T* packed_x() const { return mixed_x + (graph.softmax ? 0 : graph.order) * graph.nodes * mixed_x_node; }
  T* gamma_at(int64_t s, int half) const { return gamma + (s * 2 + half) * batch * frame(); }
  // Into how many items the mixing of one frame is cut, so that `frames` of them keep everybody busy.
  int64_t mix_parts(int64_t frames) const {
    const int64_t wanted = (kMixItems * members + frames - 1) / std::max<int64_t>(frames, 1);
    return std::max<int64_t>(std::min(wanted, graph.nodes / kMixRows), 1);
  }
};

}  // namespace

#define AUFAST_KERNELS "graph_gru.inc"
#include "foreach_isa.h"

namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr int kInputs = 10;
enum GruInput { kX, kU, kQ, kWz, kWr, kWh, kH0, kBz, kBr, kBh };

// x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h.
struct GruTensors {
  OptionalTensor input[kInputs], lengths;
  bool softmax;

  const Tensor& operator[](int k) const { return *input[k]; }
  int64_t channels() const { return input[kWz]->size(input[kWz]->dim() - 1); }
};

template <class T>
GruCall<T> describe(Door<T>& door, const GruTensors& a, int64_t few_sequences) {
  GruCall<T> c{};
  const Tensor& x = a[kX];
  const int64_t m = x.size(2), cin = x.size(3), n = a.channels(), ce = a[kU].size(1);
  const int64_t order = a.softmax ? a[kWz].size(1) : 1;
  c.members = static_cast<int>(std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(m, 1)));
  c.batch = x.size(0), c.steps = x.size(1);
  c.whole = m >= kManyNodes;
  c.live_inputs = cin, c.inputs = padded<T>(cin);
  c.live_channels = n, c.channels = padded<T>(n);
  c.low_x = c.whole ? nullptr : door.low(x, cin);
  c.x = c.low_x == nullptr ? door.in(x, cin) : nullptr;
  c.h0 = door.in(a.input[kH0], n);
  c.lengths = door.integers(a.lengths);
  c.graph = {m, ce, order, a.softmax, padded<T>(m), door.plain(a[kU])};
  Thetas<T>& t = c.thetas;
  t.nodes = t.distinct = m, t.embeddings = ce, t.columns = c.channels, t.Q = door.plain(a[kQ]);
  t.pools = a.input[kBz].has_value() ? 6 : 3;
  for (int k = 0; k < t.pools; ++k) {
    const int64_t rows = k < 3 ? order * (n + cin) : 1;
    const Tensor& weights = a[k < 3 ? kWz + k : kBz + k - 3];
    t.pool[k] =
        c.whole ? Pool<T>{door.in(weights, n), nullptr, rows, t.block} : door.pool(weights, n, rows, t.block);
    t.block += rows * t.columns;
  }
  const int64_t state_half = m * order * n * 3 * c.channels * static_cast<int64_t>(sizeof(T));
  c.by_sequences =
      !c.whole && (c.members == 1 || (c.batch >= few_sequences * c.members && state_half <= kCacheBytes));
  const int64_t rounds = (c.batch + c.members * kMostSequences - 1) / (c.members * kMostSequences);
  c.tile = c.by_sequences ? (c.batch + c.members * rounds - 1) / std::max<int64_t>(c.members * rounds, 1)
                          : c.batch;
  return c;
}

int64_t chunk_for(int64_t rows, int64_t sequences, int64_t steps) {
  return std::max<int64_t>(std::min(rows / std::max<int64_t>(sequences, 1), steps), 1);
}

template <class T>
void plan_common(GruCall<T>& c, Arena& arena, bool backward) {
  c.seats = arena.take<CrewSeat>(c.members);
  c.finished = arena.take<int64_t>(1);
  const int64_t made = c.whole ? 2 * c.pool_size() : 0;  // Θ of a node at once
  c.zeros_size = std::max({made, kPoolRows * c.channels, kTransposed * (c.channels + c.inputs), c.graph.row,
                           c.frame(), c.inputs});
  c.zeros = arena.take<T>(c.zeros_size);
  c.graph.plan(arena, backward);
  c.scratch = arena.take<T>(c.members * c.scratch_size);
  if (!c.whole) return;
  // Without softmax no support is the identity, and the packed inputs need a place of their own.
  const int64_t rows = c.batch * c.chunk, places = c.graph.order + (c.graph.softmax ? 0 : 1);
  c.mixed_x_node = padded<T>(rows * c.live_inputs) + padded<T>(1);
  c.mixed_x = arena.take<T>(places * c.graph.nodes * c.mixed_x_node);
  if (!backward) c.mixed = arena.take<T>(c.dense() * c.graph.nodes * c.mixed_node());
}

// Chunks of a whole graph's backward are of nearly equal length. Then what a member needs for itself.
template <class T>
void size_whole_backward(GruCall<T>& c) {
  const int64_t most = chunk_for(std::max(kWholeRowNodes / c.graph.nodes, kWholeRows), c.batch, c.steps),
                chunks = std::max<int64_t>((c.steps + most - 1) / most, 1);
  c.chunk = (c.steps + chunks - 1) / chunks;
  const int64_t rows = c.batch * c.chunk, n = c.channels, K = c.graph.order,
                group = std::min(kMostNodes, c.graph.nodes);
  c.theta_scratch = std::max({2 * kGateNodes * c.pool_size() + 3 * kGateNodes * n,
                              2 * group * c.transposed[0].size(), 3 * group * K * c.live_inputs * n});
  c.scratch_size = c.theta_scratch + rows * n * (1 + (c.kept_low == nullptr ? 0 : c.dense()));
  c.theta_nodes = std::min(kThetaNodes * c.members, c.graph.nodes);
}

template <class T>
void size_small_backward(GruCall<T>& c) {
  c.chunk = chunk_for(kBackwardRows, c.batch, c.steps);
  const int64_t rows = c.batch * c.chunk, group = std::min(kMostNodes, c.graph.nodes);
  c.scratch_size =
      std::max({c.graph.order * group * rows * std::max(c.inputs, c.channels), group * c.tile * c.channels,
                (c.thetas.embeddings + group) * kTransposed * c.transposed[0].row()});
  c.theta_nodes = c.graph.nodes;
}

template <class T>
void plan_whole_backward(GruCall<T>& c, Arena& arena) {
  const int64_t m = c.graph.nodes, step = c.batch * c.frame();
  c.transposed_supports = arena.take<T>(c.dense() * c.graph.matrix());
  c.transposed_pools = arena.take<T>(c.thetas.embeddings * c.transposed[0].block);
  c.gamma = arena.take<T>(c.dense() * 2 * step);
  c.grad_reset = arena.take<T>(step);
  c.turned = arena.take<T>(2 * c.batch * c.channels * c.graph.row);
  if (c.grad_x != nullptr || c.want_graph) c.gamma_x = arena.take<T>(c.graph.order * m * c.mixed_x_node);
  if (c.grad_x != nullptr) c.packed_grad_x = arena.take<T>(m * c.mixed_x_node);
}

// The arrays over a chunk that only graphs whose groups mix for themselves have.
template <class T>
void plan_small_backward(GruCall<T>& c, Arena& arena, bool pairs) {
  const int64_t rows = c.graph.order * c.batch * c.chunk, thetas = c.graph.nodes * c.transposed[0].block;
  if (pairs)
    c.thetas.pairs = arena.take<uint32_t>(thetas / 2);
  else
    c.thetas.theta = arena.take<T>(thetas);
  c.gamma_h = arena.take<T>(rows * c.frame());
  c.gamma_r = arena.take<T>(rows * c.frame());
  if (c.want_graph || c.grad_x != nullptr || c.low_grad_x != nullptr)
    c.gamma_x = arena.take<T>(rows * c.graph.nodes * c.inputs);
}

template <class T>
void prepare(GruCall<T>& c) {
  std::memset(c.seats, 0, c.members * sizeof(CrewSeat));
  *c.finished = 0;
  std::memset(c.zeros, 0, c.zeros_size * sizeof(T));
  if (c.graph.grad_supports != nullptr)
    std::memset(c.graph.grad_supports, 0, c.graph.order * c.graph.matrix() * sizeof(T));
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(const GruTensors& a, bool save) {
  Door<T> door({AUFAST_PICK(widen), AUFAST_PICK(narrow)});
  const ScalarType dtype = a[kX].scalar_type();
  const bool pairs = in_pairs(dtype, {a[kX].size(3), a.channels()});
  GruCall<T> c = describe<T>(door, a, pairs ? kFewPairs : kFewSequences);
  const ScalarType state_dtype = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  const int64_t m = c.graph.nodes, n = c.live_channels;
  Tensor out = torch::stable::empty({c.batch, c.steps, m, n}, dtype);
  Tensor h_last = torch::stable::empty({c.batch, m, n}, state_dtype);
  std::vector<int64_t> kept = {c.batch, c.steps, m, 3 * n};
  if (c.whole) kept = {2, c.dense(), m, c.kept_node()};
  if (!save) kept = {0};
  Tensor saved = torch::stable::empty(kept, dtype);
  if (h_last.numel() == 0) return {out, h_last, saved};
  for (const Tensor& result : {out, saved}) prefer_huge_pages(result);
  c.out = door.out(out, n), c.h_last = door.out(h_last, n);
  uint16_t*& low = c.whole ? c.kept_low : c.saved_low;
  T*& full = c.whole ? c.kept : c.saved;
  const int64_t saved_row = c.whole ? c.kept_node() : n;
  if (save) low = door.low(saved, saved_row);
  if (save && low == nullptr) full = door.out(saved, saved_row);
  c.chunk = chunk_for(c.whole ? kWholeRows : kForwardRows, c.tile, c.steps);
  const int64_t group = std::min(kMostNodes, m);
  c.scratch_size = group * std::max({c.graph.order * c.tile * std::max(c.chunk * c.inputs, c.channels),
                                     kPoolRows * c.channels, c.graph.embeddings});
  c.buffer_size = m * c.gate_node(c.tile) + c.tile * c.frame();
  door.workspace([&](Arena& arena) {
    plan_common(c, arena, false);
    c.thetas.theta = arena.take<T>(m * c.thetas.block);
    if (pairs) c.thetas.pairs = arena.take<uint32_t>(m * c.thetas.block / 2);
    c.buffers = arena.take<T>((c.by_sequences ? c.members : 1) * c.buffer_size);
  });
  prepare(c);
  c.thetas.tiles = aufast::isa() == aufast::Isa::amx;
  const auto kernel = AUFAST_PICK(gru_forward<T>);
  run_crew(c.members, [&](int me) { kernel(c, me); });
  door.finish();
  return {out, h_last, saved};
}

template <class T>
std::vector<Tensor> backward_as(const Tensor& grad_out, const Tensor& grad_h_last, const GruTensors& a,
                                const Tensor& out, const Tensor& saved, int64_t needs) {
  Door<T> door({AUFAST_PICK(widen), AUFAST_PICK(narrow)});
  const bool pairs = backward_in_pairs(a[kX].scalar_type(), {a[kX].size(3), a.channels()});
  GruCall<T> c = describe<T>(door, a, pairs ? kFewPairs : kFewSequences);
  const int64_t m = c.graph.nodes, n = c.live_channels, ce = c.graph.embeddings, K = c.graph.order;
  const int64_t last[kInputs] = {c.live_inputs, ce, 0, n, n, n, n, n, n, n};
  std::vector<Tensor> results;
  T* room[kInputs] = {};
  for (int k = 0; k < kInputs; ++k) {
    const bool wanted = (needs >> k & 1) && a.input[k].has_value();
    results.push_back(wanted ? torch::stable::empty(a[k].sizes(), a[k].scalar_type())
                             : torch::stable::empty({0}, a[kX].scalar_type()));
    if (!wanted) continue;
    if (k == kX && !c.whole) c.low_grad_x = door.low(results[k], last[k]);
    if (k != kX || c.low_grad_x == nullptr)
      room[k] = k == kQ ? door.out_plain(results[k]) : door.out(results[k], last[k]);
  }
  c.grad_h_last = door.in(grad_h_last, n);
  if (!c.whole) c.low_out = door.low(out, n), c.low_grad_out = door.low(grad_out, n);
  if (c.low_out == nullptr) c.out = const_cast<T*>(door.in(out, n));
  if (c.low_grad_out == nullptr) c.grad_out = door.in(grad_out, n);
  uint16_t*& low = c.whole ? c.kept_low : c.saved_low;
  T*& full = c.whole ? c.kept : c.saved;
  const int64_t saved_row = c.whole ? c.kept_node() : n;
  low = door.low(saved, saved_row);
  if (low == nullptr) full = const_cast<T*>(door.in(saved, saved_row));
  c.grad_x = room[kX], c.graph.grad_U = room[kU], c.thetas.grad_Q = room[kQ];
  for (int k = 0; k < c.thetas.pools; ++k) c.thetas.pool[k].grad = room[k < 3 ? kWz + k : kBz + k - 3];
  c.want_graph = room[kU] != nullptr;
  for (const int k : {kQ, kWz, kWr, kWh, kBz, kBr, kBh}) c.want_theta = c.want_theta || room[k] != nullptr;
  for (int gate = 0; gate < 3; ++gate) {
    TransposedPool<T>& pool = c.transposed[gate];  // a whole graph's holds the state's rows alone
    pool = {c.thetas.pool[gate].weights, K, n, c.whole ? 0 : c.live_inputs, c.channels, n, 0, 0};
    pool.theta = gate * pool.size(), pool.block = 3 * pool.size(), pool.low = c.thetas.pool[gate].low;
  }
  if (c.whole)
    size_whole_backward(c);
  else
    size_small_backward(c);
  door.workspace([&](Arena& arena) {
    plan_common(c, arena, true);
    if (c.whole)
      plan_whole_backward(c, arena);
    else
      plan_small_backward(c, arena, pairs);
    c.thetas.grad_theta = arena.take<T>(c.theta_nodes * c.thetas.block);
    c.thetas.partial_Q = arena.take<T>(c.thetas.blocks() * c.theta_nodes * ce);
    c.alpha = arena.take<T>(m * c.gate_node(c.batch));
    c.reset = arena.take<T>(c.batch * c.chunk * c.frame());
    c.grad_h = room[kH0] != nullptr ? room[kH0] : arena.take<T>(c.batch * c.frame());
  });
  prepare(c);
  const auto kernel = AUFAST_PICK(gru_backward<T>);
  run_crew(c.members, [&](int me) { kernel(c, me); });
  door.finish();
  return results;
}

std::tuple<Tensor, Tensor, Tensor> graph_gru(const Tensor& x, const Tensor& U, const Tensor& Q,
                                             const Tensor& W_z, const Tensor& W_r, const Tensor& W_h,
                                             const OptionalTensor& h0, const OptionalTensor& b_z,
                                             const OptionalTensor& b_r, const OptionalTensor& b_h,
                                             const OptionalTensor& lengths, int64_t normalization,
                                             bool save) {
  const GruTensors a = {{x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h}, lengths, normalization == 1};
  return x.scalar_type() == ScalarType::Double ? forward_as<double>(a, save) : forward_as<float>(a, save);
}

using TenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TenTensors graph_gru_backward(const Tensor& grad_out, const Tensor& grad_h_last, const Tensor& x,
                              const Tensor& U, const Tensor& Q, const Tensor& W_z, const Tensor& W_r,
                              const Tensor& W_h, const OptionalTensor& h0, const OptionalTensor& b_z,
                              const OptionalTensor& b_r, const OptionalTensor& b_h,
                              const OptionalTensor& lengths, const Tensor& out, const Tensor& saved,
                              int64_t normalization, int64_t needs) {
  const GruTensors a = {{x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h}, lengths, normalization == 1};
  const std::vector<Tensor> r = x.scalar_type() == ScalarType::Double
                                    ? backward_as<double>(grad_out, grad_h_last, a, out, saved, needs)
                                    : backward_as<float>(grad_out, grad_h_last, a, out, saved, needs);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("graph_gru", TORCH_BOX(&graph_gru));
  m.impl("graph_gru_backward", TORCH_BOX(&graph_gru_backward));
}
