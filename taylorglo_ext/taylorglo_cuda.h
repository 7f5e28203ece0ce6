// What taylorglo_cuda.cpp, which knows PyTorch, and taylorglo.cu, which knows CUDA, say to each other. They are apart because
// nvcc takes twenty seconds to read PyTorch's headers, and a few to compile the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

namespace taylorglo {

template <typename scalar_t>
using Accumulate = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// float32 or float64 numbers in device memory.
struct Real {
  const void* data;
  bool is_double;
};

constexpr int64_t kMostBlocks = 4096;

// All pointers are to device memory, and contiguous.
template <typename scalar_t>
struct Problem {
  const scalar_t* logits;
  const scalar_t* teacher_logits;  // or nullptr
  const int64_t* labels;
  scalar_t* gradient;  // or nullptr
  Accumulate<scalar_t>* loss;
  int64_t rows, classes;
  Real theta, alpha;    // alpha.data may be nullptr: then alpha_number
  double alpha_number;
  double scale;           // Eq. 2's -1/n, and the mean over the batch
  double* partial;        // kMostBlocks numbers, the sums of the blocks
  unsigned* blocks_done;  // one number, how many blocks have written theirs
};

template <typename scalar_t>
void launch_loss(const Problem<scalar_t>& problem, cudaStream_t stream);

// gradient *= upstream, for `size` numbers from a 16-byte boundary.
template <typename scalar_t>
void launch_scale(scalar_t* gradient, int64_t size, Real upstream, cudaStream_t stream);

}  // namespace taylorglo
