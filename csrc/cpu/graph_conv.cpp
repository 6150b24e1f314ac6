// AU-specific graph convolution on the CPU: out_i = Σ_s (S_s x)_i Θ_{s,i} + Q_i·bias, and its gradients.
//
// Supports and node matrices are made once. Then a work item is a group of nodes and a block of frames: it
// mixes the group's nodes for the block (one register tile of rows per frame), and multiplies each node's
// mixed rows by the node's matrix while both lie in cache. Few frames are split by nodes, so that each thread
// touches only its own nodes' matrices; many are split by frames. The backward makes each node's weight
// gradient by its owner alone, over frames in order, so nothing is atomic and the result does not depend on
// the number of threads. docs/operators/graph_conv.md derives it.

#include "graph_common.h"
#include "graph_door.h"

namespace {

constexpr int64_t kFewFrames = 96;        // up to here one block: split by nodes
constexpr int64_t kForwardFrames = 48;    // frames of a forward item
constexpr int64_t kBackwardFrames = 192;  // frames between two rendezvous of the backward
constexpr int64_t kFewNodes = 32;         // with few frames: the backward is split by input channels
constexpr int64_t kChannels = 32;         // input channels of an item of that backward

// Stored: how x, the output and their gradients lie in memory, T or bfloat16.
template <class T, class Stored>
struct ConvCall {
  Graph<T> graph;
  Thetas<T> thetas;
  TransposedPool<T> transposed;
  int64_t frames, frame_block;
  int64_t inputs, live_inputs, outputs, live_outputs;  // padded, and without padding
  const Stored *x, *grad;
  Stored *out, *grad_x;
  bool want_theta, want_graph;
  T *zeros, *one, *gamma, *scratch;
  bool pairs;            // the backward takes products of bfloat16 pairs
  bool by_channels;      // the backward is split by input channels, else by nodes
  T* partial_S;          // by channels: each item's part of grad S, (items, K, m, row)
  int64_t scratch_size;  // of one member
  CrewSeat* seats;
  int64_t* finished;
  int members;

  int64_t channel_items() const { return (inputs + kChannels - 1) / kChannels; }
  int64_t frame_blocks() const { return (frames + frame_block - 1) / frame_block; }
  int64_t frames_from(int64_t begin) const {
    return frames - begin < frame_block ? frames - begin : frame_block;
  }
};

// A member's room for one item of the backward by channels, the widest.
template <class T>
struct ChannelRoom {
  T *theta, *gamma, *mixed,
      *grad_theta;       // Θᵀ (distinct, K, outputs, width); γ; φ; grad Θ (m, width, outputs)
  T* turned;             // for making Θᵀ, before there is γ
  T *rows, *mixed_rows;  // a node's gradient and φ as products take them
  T* S;                  // supports in pairs, (K, pairs of nodes, m)
  int64_t size = 0;

  template <class Stored>
  ChannelRoom(const ConvCall<T, Stored>& c, T* at) {
    const int64_t m = c.graph.nodes, K = c.graph.order;
    const auto take = [&](int64_t count) {
      size += apart<T>(count);
      return at == nullptr ? nullptr : at + size - apart<T>(count);
    };
    theta = take(c.thetas.distinct * apart<T>(K * c.live_outputs * kChannels));
    turned = gamma =
        take(kChannels * std::max(K * c.frames * m, (c.thetas.embeddings + c.thetas.distinct) * kTransposed));
    mixed = take(m * apart<T>(c.frames * kChannels));
    grad_theta = take(m * apart<T>(c.outputs * kChannels));
    rows = take(sizeof(Stored) == sizeof(T) ? 0 : c.frames * c.outputs);
    mixed_rows = take(sizeof(Stored) == sizeof(T) ? 0 : c.frames * kChannels);
    S = take(sizeof(Stored) == sizeof(T) ? 0 : K * ((m + 1) / 2) * m);
  }
};

}  // namespace

#define AUFAST_KERNELS "graph_conv.inc"
#include "foreach_isa.h"

namespace {

using OptionalTensor = std::optional<Tensor>;
enum ConvGradient { kGradX, kGradU, kGradQ, kGradW, kGradBias };

// What forward and backward have in common: sizes, the graph and the pools.
template <class T, class Stored>
ConvCall<T, Stored> describe(Door<T>& door, const Tensor& x, const Tensor& U, const OptionalTensor& Q,
                             const Tensor& W, const OptionalTensor& bias, bool softmax) {
  ConvCall<T, Stored> c{};
  const int64_t m = U.size(0), cin = x.size(x.dim() - 1), cout = W.size(W.dim() - 1);
  const int64_t order = softmax ? W.size(W.dim() - 3) : 1;
  c.members = static_cast<int>(std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(m, 1)));
  c.live_inputs = cin, c.inputs = padded<T>(cin);
  c.live_outputs = cout, c.outputs = padded<T>(cout);
  c.frames = 1;
  for (int64_t d = 0; d < x.dim() - 2; ++d) c.frames *= x.size(d);
  c.x = door.template stored<Stored>(x, cin);
  c.graph = {m, U.size(1), order, softmax, padded<T>(m), door.plain(U)};
  Thetas<T>& t = c.thetas;
  t.nodes = m, t.distinct = Q.has_value() ? m : std::min<int64_t>(m, 1), t.columns = c.outputs;
  t.embeddings = Q.has_value() ? Q->size(1) : 1;
  t.Q = Q.has_value() ? door.plain(*Q) : nullptr;
  t.pools = bias.has_value() ? 2 : 1;
  t.pool[0] = door.pool(W, cout, order * cin, 0);
  t.block = order * cin * c.outputs;
  if (bias.has_value()) {
    t.pool[1] = door.pool(*bias, cout, 1, t.block);
    t.block += c.outputs;
  }
  t.block = apart<T>(t.block);
  return c;
}

template <class T, class Stored>
void plan_common(ConvCall<T, Stored>& c, Arena& arena, bool backward) {
  c.seats = arena.take<CrewSeat>(c.members);
  c.finished = arena.take<int64_t>(1);
  c.zeros = arena.take<T>(std::max({kPoolRows * c.outputs, kTransposed * c.inputs, c.graph.row}));
  c.one = arena.take<T>(c.graph.nodes + 1);
  c.graph.plan(arena, backward);
  c.scratch = arena.take<T>(c.members * c.scratch_size);
}

// Everything the kernels expect to find set before the crew starts.
template <class T, class Stored>
void prepare(ConvCall<T, Stored>& c, bool backward) {
  std::memset(c.seats, 0, c.members * sizeof(CrewSeat));
  *c.finished = 0;
  std::memset(c.zeros, 0, reinterpret_cast<char*>(c.one) - reinterpret_cast<char*>(c.zeros));
  std::fill(c.one, c.one + c.graph.nodes + 1, T(1));
  if (c.thetas.Q == nullptr) c.thetas.Q = c.one;
  if (backward) std::memset(c.graph.grad_supports, 0, c.graph.order * c.graph.matrix() * sizeof(T));
}

template <class T, class Stored>
Tensor forward_as(const Tensor& x, const Tensor& U, const OptionalTensor& Q, const Tensor& W,
                  const OptionalTensor& bias, bool softmax) {
  Door<T> door({AUFAST_PICK(widen), AUFAST_PICK(narrow)});
  ConvCall<T, Stored> c = describe<T, Stored>(door, x, U, Q, W, bias, softmax);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = c.live_outputs;
  Tensor out = torch::stable::empty(sizes, x.scalar_type());
  if (out.numel() == 0) return out;
  c.out = door.template stored_out<Stored>(out, c.live_outputs);
  c.frame_block = c.frames <= kFewFrames ? c.frames : kForwardFrames;
  const int64_t group = std::min(kMostNodes, c.graph.nodes);
  c.scratch_size =
      group * std::max({c.graph.order * c.frame_block * c.inputs, kPoolRows * c.outputs, c.graph.embeddings});
  const bool pairs = sizeof(Stored) == 2 && in_pairs(x.scalar_type(), {c.live_inputs});
  c.thetas.tiles = aufast::isa() == aufast::Isa::amx;
  if (pairs) c.scratch_size += c.thetas.tiles ? c.frame_block * c.outputs : (c.graph.nodes + 1) / 2 * group;
  door.workspace([&](Arena& arena) {
    plan_common(c, arena, false);
    c.thetas.theta = arena.take<T>(c.thetas.distinct * c.thetas.block);
    if (pairs) c.thetas.pairs = arena.take<uint32_t>(c.thetas.distinct * c.thetas.block / 2);
  });
  prepare(c, false);
  const auto kernel = AUFAST_PICK(conv_forward<T, Stored>);
  run_crew(c.members, [&](int me) { kernel(c, me); });
  door.finish();
  return out;
}

template <class T, class Stored>
void plan_by_nodes(ConvCall<T, Stored>& c, Arena& arena) {
  if (c.pairs)
    c.thetas.pairs = arena.take<uint32_t>(c.thetas.distinct * c.transposed.block / 2);
  else
    c.thetas.theta = arena.take<T>(c.thetas.distinct * c.transposed.block);
  c.gamma = arena.take<T>(c.graph.order * c.frame_block * c.graph.nodes * c.inputs);
  c.thetas.grad_theta = arena.take<T>(c.graph.nodes * c.thetas.block);
  c.thetas.partial_Q = arena.take<T>(c.thetas.blocks() * c.graph.nodes * c.thetas.embeddings);
}

template <class T, class Stored>
void plan_by_channels(ConvCall<T, Stored>& c, Arena& arena) {
  const int64_t m = c.graph.nodes, items = c.channel_items();
  c.partial_S = arena.take<T>(items * c.graph.order * c.graph.matrix());
  c.thetas.partial_Q = arena.take<T>((c.graph.order * items + 1) * m * c.thetas.embeddings);
}

template <class T, class Stored>
std::vector<Tensor> backward_as(const Tensor& grad, const Tensor& x, const Tensor& U, const OptionalTensor& Q,
                                const Tensor& W, const OptionalTensor& bias, bool softmax, int64_t needs) {
  Door<T> door({AUFAST_PICK(widen), AUFAST_PICK(narrow)});
  ConvCall<T, Stored> c = describe<T, Stored>(door, x, U, Q, W, bias, softmax);
  const OptionalTensor inputs[] = {x, U, Q, W, bias};
  c.by_channels = c.frames <= kFewFrames && c.graph.nodes <= kFewNodes;
  std::vector<Tensor> results;
  T* room[5] = {};
  const int64_t last[] = {c.live_inputs, U.size(1), 0, c.live_outputs, c.live_outputs};
  for (int k = 0; k < 5; ++k) {
    const bool wanted = (needs >> k & 1) && inputs[k].has_value();
    results.push_back(wanted ? torch::stable::empty(inputs[k]->sizes(), x.scalar_type())
                             : torch::stable::empty({0}, x.scalar_type()));
    if (!wanted) continue;
    c.want_theta = c.want_theta || k >= kGradQ;
    if (k == kGradX)
      c.grad_x = door.template stored_out<Stored>(results[k], last[k]);
    else if (k >= kGradW && c.by_channels && sizeof(Stored) != sizeof(T))
      c.thetas.pool[k - kGradW].low_grad = door.low(results[k], last[k]);
    else
      room[k] = k == kGradQ ? door.out_plain(results[k]) : door.out(results[k], last[k]);
  }
  c.grad = door.template stored<Stored>(grad, c.live_outputs);
  c.thetas.pool[0].grad = room[kGradW], c.thetas.pool[1].grad = room[kGradBias],
  c.thetas.grad_Q = room[kGradQ];
  c.graph.grad_U = room[kGradU];
  c.want_graph = room[kGradU] != nullptr;
  c.transposed = {c.thetas.pool[0].weights, c.graph.order, c.live_inputs, 0, c.outputs, c.live_outputs, 0, 0};
  c.transposed.block = apart<T>(c.transposed.size()), c.transposed.low = c.thetas.pool[0].low;
  c.frame_block = std::max<int64_t>(std::min(c.frames, kBackwardFrames), 1);
  const int64_t m = c.graph.nodes, K = c.graph.order;
  const int64_t group = std::min(kMostNodes, m);
  c.pairs = sizeof(Stored) == 2 && backward_in_pairs(x.scalar_type(), {c.live_inputs, c.live_outputs});
  c.scratch_size = c.by_channels ? ChannelRoom<T>(c, nullptr).size
                                 : std::max(c.frame_block * (K * group * c.inputs + c.outputs),
                                            (c.thetas.embeddings + group) * kTransposed * c.transposed.row());
  door.workspace([&](Arena& arena) {
    plan_common(c, arena, true);
    if (c.by_channels)
      plan_by_channels(c, arena);
    else
      plan_by_nodes(c, arena);
  });
  prepare(c, true);
  const auto kernel = AUFAST_PICK(conv_backward<T, Stored>);
  run_crew(c.members, [&](int me) { kernel(c, me); });
  door.finish();
  return results;
}

// Calls `run` for the types that tensors like x are computed and stored in. Low precision whose rows are not
// whole vectors of bfloat16 is converted at the door.
template <class Run>
auto as_stored(const Tensor& x, const Tensor& W, const Run& run) {
  if (x.scalar_type() == ScalarType::Double) return run.template operator()<double, double>();
  if (stored_low<float>(x.scalar_type(), {x.size(x.dim() - 1), W.size(W.dim() - 1)}))
    return run.template operator()<float, uint16_t>();
  return run.template operator()<float, float>();
}

Tensor graph_conv(const Tensor& x, const Tensor& U, const OptionalTensor& Q, const Tensor& W,
                  const OptionalTensor& bias, int64_t normalization) {
  return as_stored(x, W, [&]<class T, class Stored>() {
    return forward_as<T, Stored>(x, U, Q, W, bias, normalization == 1);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> graph_conv_backward(
    const Tensor& grad, const Tensor& x, const Tensor& U, const OptionalTensor& Q, const Tensor& W,
    const OptionalTensor& bias, int64_t normalization, int64_t needs) {
  const std::vector<Tensor> r = as_stored(x, W, [&]<class T, class Stored>() {
    return backward_as<T, Stored>(grad, x, U, Q, W, bias, normalization == 1, needs);
  });
  return {r[0], r[1], r[2], r[3], r[4]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("graph_conv", TORCH_BOX(&graph_conv));
  m.impl("graph_conv_backward", TORCH_BOX(&graph_conv_backward));
}
