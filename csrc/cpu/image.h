// What the operators on images share outside of their loops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>

namespace {

// What elements stored as T are computed in; uint16_t stands for bfloat16.
template <class T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Dense in the order batch, height, width, channels, and not also in the default order.
bool is_channels_last(const torch::stable::Tensor& features) {
  if (features.is_contiguous()) return false;
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (features.size(dim) != 1 && features.stride(dim) != expected) return false;
    expected *= features.size(dim);
  }
  return true;
}

}  // namespace
