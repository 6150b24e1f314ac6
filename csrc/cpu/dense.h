// Tensors as the kernels read them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "pages.h"

namespace {

// Asking the dispatcher costs a tenth of a small call.
inline torch::stable::Tensor dense_of(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<torch::stable::Tensor> dense_of(const std::optional<torch::stable::Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return dense_of(*tensor);
}

template <class T>
T* data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

inline void prefer_huge_pages(const torch::stable::Tensor& tensor) {
  prefer_huge_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
}

}  // namespace
