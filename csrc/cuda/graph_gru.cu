// Graph-GRU on NVIDIA GPUs: one launch runs all steps of a direction.
//
// What does not depend on the state is made before and after, for all steps at once, by PyTorch's own
// products (aufast/ops/graph_gru_cuda.py): S, Θ, the input half of the gates, and every gradient but those of
// the gates. Here is the rest, `graph_gru_steps` and its backward. The kernels are in graph_gru_forward.cuh
// and graph_gru_backward.cuh; this file chooses how a call is cut and launches them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "graph_gru_backward.cuh"
#include "graph_gru_forward.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kMostWarps = kMostThreads / 32;

const void* address(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

bool aligned(std::initializer_list<const void*> addresses) {
  return std::all_of(addresses.begin(), addresses.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

int64_t rounded_up(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// As many warps as give each the same number of strips, one where that is possible.
int threads_for(int strips) {
  return static_cast<int>(32 * rounded_up(strips, rounded_up(strips, kMostWarps)));
}

// `gates` gives the sizes, the others must fit them.
Walk describe(const char* what, const Tensor& gates, const Tensor& theta, const Tensor& supports,
              const OptionalTensor& h0, const OptionalTensor& lengths) {
  const ScalarType dtype = gates.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  what, ": the gates must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(gates.dim() == 4 && gates.size(3) % 3 == 0 && gates.numel() > 0 && supports.dim() == 3,
                  what, ": the gates must be (m, B, T, 3c), none of them 0, and the supports (m, K, m)");
  const int64_t m = gates.size(0), c = gates.size(3) / 3, padded = (c + 15) / 16 * 16, K = supports.size(1);
  check_argument(what, "gates", gates, dtype, {m, gates.size(1), gates.size(2), 3 * c}, "gates", gates);
  check_argument(what, "theta", theta, dtype, {m, 3 * K * padded * padded}, "gates", gates);
  STD_TORCH_CHECK(aligned({theta.data_ptr()}), what, ": theta must begin at a multiple of 16 bytes");
  check_argument(what, "supports", supports, ScalarType::Float, {m, K, m}, "gates", gates);
  if (h0.has_value())
    check_argument(what, "h0", *h0, ScalarType::Float, {gates.size(1), m, c}, "gates", gates);
  if (lengths.has_value())
    check_argument(what, "lengths", *lengths, ScalarType::Long, {gates.size(1)}, "gates", gates);
  Walk w = {};
  w.nodes = static_cast<int>(gates.size(0)), w.batch = gates.size(1), w.steps = gates.size(2);
  w.channels = static_cast<int>(gates.size(3) / 3), w.padded = (w.channels + 15) / 16 * 16;
  w.order = static_cast<int>(supports.size(1));
  w.theta = theta.data_ptr(), w.supports = static_cast<const float*>(supports.data_ptr());
  w.theta_bytes = theta.size(1) * theta.element_size();
  w.lengths = static_cast<const int64_t*>(address(lengths));
  return w;
}

// Cuts a call for a kernel that takes up to `most` sequences in a tile; `Room` lays out its shared memory.
// The sequences are spread over all groups that run at the same time, since a short tile takes a short time.
template <class T, template <class> class Room, class Arguments>
bool plan(Arguments& a, Shape& shape, const Device& device, void (*kernel)(Arguments), int most, int strips) {
  Walk& w = a.walk;
  for (const bool clusters : {true, false})
    for (const bool resident : {true, false}) {
      w.clusters = clusters, w.resident = resident;
      shape = {w.nodes, clusters ? w.nodes : 0, threads_for(strips), Room<T>(w, most).bytes};
      if ((clusters && !device.clusters) || shape.shared > static_cast<size_t>(device.shared)) continue;
      const int64_t groups = device.resident_groups(kernel, shape, w.nodes);
      if (groups == 0) continue;
      w.turns = static_cast<int>(rounded_up(w.batch, groups * most));
      w.rows = static_cast<int>(rounded_up(w.batch, groups * w.turns));
      w.groups = static_cast<int>(std::min(groups, rounded_up(w.batch, w.rows)));
      shape.blocks = w.groups * w.nodes;
      return true;
    }
  return false;
}

// Global memory through which the blocks of a group meet where they are no cluster.
class Meeting {
 public:
  Meeting(Walk& w, const Tensor& like, int64_t published) {
    if (w.clusters) return;
    exchange_ = torch::stable::new_empty(like, {w.groups * 2 * w.nodes * published});
    arrivals_ = torch::stable::new_zeros(like, {w.groups}, ScalarType::Int);
    w.exchange = exchange_->data_ptr();
    w.arrivals = static_cast<unsigned*>(arrivals_->data_ptr());
  }

 private:
  OptionalTensor exchange_, arrivals_;
};

// A kernel and the sequences it takes at a time.
template <class Arguments>
struct Choice {
  int rows;
  void (*kernel)(Arguments);
};

// The choices go from few sequences at a time to many. Taken is the first that needs no turns, else the last
// one that can exchange and keep its matrices as the first does.
template <class T, template <class> class Room, class Arguments>
void run(Arguments a, const Tensor& like, int strips, const std::vector<Choice<Arguments>>& choices) {
  const Device device(like.get_device_index());
  Arguments taken = a;
  Shape taken_shape = {};
  const Choice<Arguments>* choice = nullptr;
  for (const Choice<Arguments>& next : choices) {
    Shape shape;
    if (!plan<T, Room>(a, shape, device, next.kernel, next.rows, strips)) continue;
    const bool as_good = a.walk.clusters == taken.walk.clusters && a.walk.resident == taken.walk.resident;
    if (choice != nullptr && !as_good) break;
    taken = a, taken_shape = shape, choice = &next;
    if (a.walk.turns == 1) break;
  }
  STD_TORCH_CHECK(choice != nullptr, "graph_gru: this GPU has no room for ", a.walk.nodes,
                  " blocks at a time");
  const Meeting meeting(taken.walk, like, Room<T>::published(taken.walk, choice->rows));
  device.launch(choice->kernel, taken_shape, taken);
}

template <class Product>
std::vector<Choice<Forward<typename Product::T>>> forward_choices() {
  if constexpr (Product::kLeastHalves == 1)
    return {{8, &graph_gru_forward<Product, 1>},
            {16, &graph_gru_forward<Product, 2>},
            {32, &graph_gru_forward<Product, 4>}};
  else
    return {{16, &graph_gru_forward<Product, 2>}, {32, &graph_gru_forward<Product, 4>}};
}

template <class Product>
std::vector<Choice<Backward<typename Product::T>>> backward_choices() {
  if constexpr (Product::kLeastHalves == 1)
    return {{8, &graph_gru_backward<Product, 1>},
            {16, &graph_gru_backward<Product, 2>},
            {32, &graph_gru_backward<Product, 4>}};
  else
    return {{16, &graph_gru_backward<Product, 2>}, {32, &graph_gru_backward<Product, 4>}};
}

template <class Product>
std::tuple<Tensor, Tensor, Tensor> forward_as(const Tensor& gates, Walk walk, const OptionalTensor& h0,
                                              bool save) {
  using T = typename Product::T;
  const int64_t m = walk.nodes, c = walk.channels;
  Tensor out = torch::stable::new_empty(gates, {walk.batch, walk.steps, m, c});
  Tensor h_last = torch::stable::new_empty(gates, {walk.batch, m, c}, ScalarType::Float);
  Tensor saved = save ? torch::stable::new_empty(gates, {walk.batch, walk.steps, m, 3 * c})
                      : torch::stable::new_empty(gates, {0});
  walk.whole = c % 4 == 0 && aligned({gates.data_ptr(), address(h0)});
  run<T, ForwardRoom>(
      Forward<T>{walk, static_cast<const T*>(gates.data_ptr()), static_cast<const float*>(address(h0)),
                 static_cast<T*>(out.data_ptr()), save ? static_cast<T*>(saved.data_ptr()) : nullptr,
                 static_cast<float*>(h_last.data_ptr())},
      gates, walk.padded / 8, forward_choices<Product>());
  return {out, h_last, saved};
}

template <class Product>
std::tuple<Tensor, Tensor> backward_as(const Tensor& grad_out, const Tensor& grad_h_last, const Tensor& out,
                                       const Tensor& saved, const Tensor& d_gates, Walk walk,
                                       const OptionalTensor& h0) {
  using T = typename Product::T;
  Tensor d_h0 = torch::stable::new_empty(grad_h_last, {walk.batch, walk.nodes, walk.channels});
  walk.whole = walk.channels % 4 == 0 && aligned({grad_out.data_ptr(), grad_h_last.data_ptr(), out.data_ptr(),
                                                  saved.data_ptr(), address(h0)});
  run<T, BackwardRoom>(
      Backward<T>{walk, static_cast<const T*>(grad_out.data_ptr()), static_cast<const T*>(out.data_ptr()),
                  static_cast<const T*>(saved.data_ptr()), static_cast<const float*>(address(h0)),
                  static_cast<const float*>(grad_h_last.data_ptr()), static_cast<T*>(d_gates.data_ptr()),
                  static_cast<float*>(d_h0.data_ptr())},
      out, walk.order * walk.padded / 8, backward_choices<Product>());
  return {d_gates, d_h0};
}

// Calls `use` with the way to multiply: by dtype, float32 by TF32 where that is allowed.
template <class Use>
auto with_product(ScalarType dtype, bool tf32, const Use& use) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return use(BFloat16());
    case ScalarType::Half:
      return use(Float16());
    default:
      return tf32 ? use(Tf32()) : use(Ieee());
  }
}

std::tuple<Tensor, Tensor, Tensor> graph_gru_steps(const Tensor& gates, const Tensor& theta,
                                                   const Tensor& supports, const OptionalTensor& h0,
                                                   const OptionalTensor& lengths, bool tf32, bool save) {
  const Walk walk = describe("graph_gru_steps", gates, theta, supports, h0, lengths);
  return with_product(gates.scalar_type(), tf32,
                      [&](auto product) { return forward_as<decltype(product)>(gates, walk, h0, save); });
}

std::tuple<Tensor, Tensor> graph_gru_steps_backward(const Tensor& grad_out, const Tensor& grad_h_last,
                                                    const Tensor& out, const Tensor& saved,
                                                    const Tensor& theta, const Tensor& supports,
                                                    const OptionalTensor& h0, const OptionalTensor& lengths,
                                                    bool tf32) {
  constexpr const char* what = "graph_gru_steps_backward";
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(out.dim() == 4, what, ": out must be (B, T, m, c)");
  const int64_t batch = out.size(0), steps = out.size(1), nodes = out.size(2), c = out.size(3);
  check_argument(what, "out", out, dtype, {batch, steps, nodes, c}, "out", out);
  check_argument(what, "grad_out", grad_out, dtype, {batch, steps, nodes, c}, "out", out);
  check_argument(what, "grad_h_last", grad_h_last, ScalarType::Float, {batch, nodes, c}, "out", out);
  check_argument(what, "saved", saved, dtype, {batch, steps, nodes, 3 * c}, "out", out);
  const Tensor d_gates = torch::stable::new_empty(saved, {nodes, batch, steps, 3 * c});
  const Walk walk = describe(what, d_gates, theta, supports, h0, lengths);
  return with_product(out.scalar_type(), tf32, [&](auto product) {
    return backward_as<decltype(product)>(grad_out, grad_h_last, out, saved, d_gates, walk, h0);
  });
}

}  // namespace

#ifdef __CUDACC__
STABLE_TORCH_LIBRARY_IMPL(aufast, CUDA, m) {
#else  // the emulator's
STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
#endif
  m.impl("graph_gru_steps", TORCH_BOX(&graph_gru_steps));
  m.impl("graph_gru_steps_backward", TORCH_BOX(&graph_gru_steps_backward));
}
