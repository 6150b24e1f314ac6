// What a raw operator asks of its tensors before their addresses go to a kernel: the dispatcher looks at one
// of them, and memory of another device, size or type would end the process.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace {

inline bool on_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  int32_t type_a = 0, type_b = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &type_a));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &type_b));
  return type_a == type_b && a.get_device_index() == b.get_device_index();
}

inline void check_device(const char* what, const char* name, const torch::stable::Tensor& tensor,
                         const char* like_name, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(on_same_device(tensor, like), what, ": ", name, " is on another device than ", like_name);
}

inline void check_argument(const char* what, const char* name, const torch::stable::Tensor& tensor,
                           torch::headeronly::ScalarType dtype, std::initializer_list<int64_t> sizes,
                           const char* like_name, const torch::stable::Tensor& like) {
  check_device(what, name, tensor, like_name, like);
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() &&
              tensor.scalar_type() == dtype;
  int64_t dim = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dim++) == size;
  STD_TORCH_CHECK(fits, what, ": ", name, " has a size, dtype or layout that does not fit ", like_name);
}

}  // namespace
