// Kernels that the emulator must see through, right ones and wrong ones.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "device.cuh"

namespace {

struct Arguments {
  float* out;
  int64_t mistake;
};

// out[i] = sum over the cluster's blocks of a number of thread i's left neighbour, by way of shared memory.
__global__ void neighbours(const __grid_constant__ Arguments a) {
  float* room = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x, left = (i + blockDim.x - 1) % blockDim.x;
  if (a.mistake == 1 && i == 3) return;  // never comes to the barrier
  if (a.mistake != 2) room[i] = static_cast<float>(100 * blockIdx.x + i);
  if (a.mistake != 3) cluster_sync();
  float sum = 0.0f;
  for (int b = 0; b < 3; ++b) sum += in_block(room, b)[left];
  if (a.mistake < 4) cluster_sync();
  if (a.mistake != 5) room[i] = -1.0f;
  a.out[blockIdx.x * blockDim.x + i] = sum;
}

// The blocks of a cooperative launch, one after the other.
__global__ void in_turn(const __grid_constant__ Arguments a) {
  unsigned* arrivals = reinterpret_cast<unsigned*>(a.out + 1);
  for (int turn = 0; turn < static_cast<int>(gridDim.x); ++turn) {
    if (blockIdx.x == turn && threadIdx.x == 0) *a.out = *a.out * 2.0f + static_cast<float>(turn);
    grid_sync(arrivals, (turn + 1) * gridDim.x + (a.mistake == 1 && turn == 2));
  }
}

void run_neighbours(const torch::stable::Tensor& out, int64_t mistake) {
  const Device device(0);
  device.launch(&neighbours, Shape{3, 3, 64, 64 * sizeof(float)},
                Arguments{static_cast<float*>(out.data_ptr()), mistake});
}

void run_in_turn(const torch::stable::Tensor& out, int64_t mistake) {
  const Device device(0);
  device.launch(&in_turn, Shape{4, 0, 64, 16}, Arguments{static_cast<float*>(out.data_ptr()), mistake});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aufast_emulator, m) {
  m.def("neighbours(Tensor out, int mistake) -> ()");
  m.def("in_turn(Tensor out, int mistake) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aufast_emulator, CPU, m) {
  m.impl("neighbours", TORCH_BOX(&run_neighbours));
  m.impl("in_turn", TORCH_BOX(&run_in_turn));
}
