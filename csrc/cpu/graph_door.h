// The door of the graph operators: tensors of any layout and floating dtype become padded arrays of the type
// that the kernels compute in (float for low precision), and results go back. A tensor that already is such
// an array is used where it lies.
#pragma once

#include "dense.h"
#include "graph_common.h"
#include "pages.h"

namespace {

constexpr int64_t kDoorGrain = 16384;  // elements that are worth a thread

template <class From, class To>
void convert_rows(const void* from, int64_t from_row, void* to, int64_t to_row, int64_t rows,
                  int64_t columns) {
  torch::stable::parallel_for(0, rows, kDoorGrain / (columns + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const From* source = static_cast<const From*>(from) + row * from_row;
      To* target = static_cast<To*>(to) + row * to_row;
      for (int64_t i = 0; i < columns; ++i) target[i] = static_cast<To>(source[i]);
      for (int64_t i = columns; i < to_row; ++i) target[i] = To(0.0f);
    }
  });
}

// The instruction-set level's conversions of bfloat16, for the rows that have no padding.
struct Conversions {
  void (*widen)(const uint16_t*, float*, int64_t);
  void (*narrow)(const float*, uint16_t*, int64_t);
};

template <class From, class To>
void convert_flat(void (*convert)(const From*, To*, int64_t), const void* from, void* to, int64_t n) {
  torch::stable::parallel_for(0, n, kDoorGrain, [=](int64_t begin, int64_t end) {
    convert(static_cast<const From*>(from) + begin, static_cast<To*>(to) + begin, end - begin);
  });
}

template <class T>
class Door {
 public:
  explicit Door(Conversions conversions) : conversions_(conversions) {}

  // (…, columns) as (rows, padded columns) of T.
  const T* in(const Tensor& tensor, int64_t columns) {
    kept_.push_back(dense_of(tensor));
    const Tensor& dense = kept_.back();
    if (native(dense.scalar_type()) && columns == padded<T>(columns))
      return static_cast<const T*>(dense.data_ptr());
    const int64_t rows = columns == 0 ? 0 : dense.numel() / columns;
    T* copy = array(rows * padded<T>(columns));
    const void* from = dense.data_ptr();
    if (dense.scalar_type() == ScalarType::BFloat16 && columns == padded<T>(columns)) {
      convert_flat(conversions_.widen, from, copy, rows * columns);
      return copy;
    }
    switch (dense.scalar_type()) {
      case ScalarType::BFloat16:
        convert_rows<c10::BFloat16, T>(from, columns, copy, padded<T>(columns), rows, columns);
        break;
      case ScalarType::Half:
        convert_rows<c10::Half, T>(from, columns, copy, padded<T>(columns), rows, columns);
        break;
      case ScalarType::Float:
        convert_rows<float, T>(from, columns, copy, padded<T>(columns), rows, columns);
        break;
      default:
        convert_rows<double, T>(from, columns, copy, padded<T>(columns), rows, columns);
    }
    return copy;
  }
  const T* in(const std::optional<Tensor>& tensor, int64_t columns) {
    return tensor.has_value() ? in(*tensor, columns) : nullptr;
  }
  // The same without padding, for matrices that are only read element by element.
  const T* plain(const Tensor& tensor) {
    if (native(tensor.scalar_type()) && tensor.is_contiguous())
      return static_cast<const T*>(tensor.data_ptr());
    return in(torch::stable::reshape(tensor, {tensor.numel()}), tensor.numel());
  }

  // The bfloat16 values themselves, for what the kernels read and write without conversion; null for other
  // dtypes, and where rows would need padding.
  uint16_t* low(const Tensor& tensor, int64_t columns) {
    if (!stored_low<T>(tensor.scalar_type(), {columns})) return nullptr;
    kept_.push_back(dense_of(tensor));
    return static_cast<uint16_t*>(kept_.back().data_ptr());
  }
  // Either, as the kernel's type says.
  template <class Stored>
  const Stored* stored(const Tensor& tensor, int64_t columns) {
    if constexpr (sizeof(Stored) == sizeof(T))
      return in(tensor, columns);
    else
      return low(tensor, columns);
  }
  template <class Stored>
  Stored* stored_out(const Tensor& tensor, int64_t columns) {
    if constexpr (sizeof(Stored) == sizeof(T))
      return out(tensor, columns);
    else
      return low(tensor, columns);
  }
  // Weights that node matrices are made of; bfloat16 is read as it is.
  Pool<T> pool(const Tensor& weights, int64_t columns, int64_t rows, int64_t theta) {
    const uint16_t* stored = low(weights, columns);
    return {stored == nullptr ? in(weights, columns) : nullptr, nullptr, rows, theta, stored};
  }

  const int64_t* integers(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) return nullptr;
    kept_.push_back(dense_of(*tensor));
    return static_cast<const int64_t*>(kept_.back().data_ptr());
  }

  // Room for a result that `finish` brings back into `tensor`, which must be contiguous; its last dimension
  // may be several times `columns`.
  T* out(const Tensor& tensor, int64_t columns) {
    if (native(tensor.scalar_type()) && columns == padded<T>(columns))
      return static_cast<T*>(tensor.data_ptr());
    const int64_t rows = columns == 0 ? 0 : tensor.numel() / columns;
    T* room = array(rows * padded<T>(columns));
    results_.push_back({tensor, room, rows, columns});
    return room;
  }
  T* out_plain(const Tensor& tensor) {
    if (native(tensor.scalar_type())) return static_cast<T*>(tensor.data_ptr());
    return out(torch::stable::reshape(tensor, {tensor.numel()}), tensor.numel());
  }
  void finish() {
    for (const Result& r : results_) {
      void* to = r.tensor.data_ptr();
      if (r.tensor.scalar_type() == ScalarType::BFloat16 && r.columns == padded<T>(r.columns)) {
        convert_flat(conversions_.narrow, r.room, to, r.rows * r.columns);
        continue;
      }
      switch (r.tensor.scalar_type()) {
        case ScalarType::BFloat16:
          convert_rows<T, c10::BFloat16>(r.room, padded<T>(r.columns), to, r.columns, r.rows, r.columns);
          break;
        case ScalarType::Half:
          convert_rows<T, c10::Half>(r.room, padded<T>(r.columns), to, r.columns, r.rows, r.columns);
          break;
        case ScalarType::Float:
          convert_rows<T, float>(r.room, padded<T>(r.columns), to, r.columns, r.rows, r.columns);
          break;
        default:
          convert_rows<T, double>(r.room, padded<T>(r.columns), to, r.columns, r.rows, r.columns);
      }
    }
  }

  T* array(int64_t count) {
    arrays_.push_back(torch::stable::empty({count}, type()));
    void* memory = arrays_.back().data_ptr();
    prefer_huge_pages(memory, count * static_cast<int64_t>(sizeof(T)));
    return static_cast<T*>(memory);
  }
  // The workspace: `plan` takes pieces of an arena, once to count them and once to place them.
  template <class Plan>
  void workspace(const Plan& plan) {
    Arena counting;
    plan(counting);
    constexpr int64_t size = sizeof(T), line = 128;
    thread_local KeptWorkspace kept;
    void* memory = kept.get(counting.used + line);
    if (memory == nullptr) memory = array((counting.used + line) / size + 1);
    Arena arena;
    arena.base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + line - 1) / line * line);
    plan(arena);
  }

 private:
  struct Result {
    Tensor tensor;
    T* room;
    int64_t rows, columns;
  };
  static constexpr ScalarType type() { return sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double; }
  static bool native(ScalarType dtype) { return dtype == type(); }

  Conversions conversions_;
  std::vector<Tensor> kept_, arrays_;
  std::vector<Result> results_;
};

// Runs `member(me)` for every member of a crew on torch's threads. The pool may give fewer threads than
// members.
template <class Member>
void run_crew(int members, const Member& member) {
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t me = begin; me < end; ++me) member(static_cast<int>(me));
  });
}

}  // namespace
