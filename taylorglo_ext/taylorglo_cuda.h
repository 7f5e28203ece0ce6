// What taylorglo_cuda.cpp, which knows PyTorch, and taylorglo.cu, which knows CUDA, say to each
// other. They are apart because nvcc takes twenty seconds to read PyTorch's headers, and a few to
// compile the kernels.
#pragma once

#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

namespace taylorglo {

template <typename scalar_t>
using Accumulate = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// float16 cannot hold the small numbers of a gradient until a loss scale has lifted them.
template <typename scalar_t>
using Gradient = std::conditional_t<std::is_same_v<scalar_t, c10::Half>, float, scalar_t>;

// float32 or float64 numbers in device memory.
struct Real {
  const void* data;
  bool is_double;
};

constexpr int kMostBlocks = 8192;

// All pointers are to device memory, and contiguous.
template <typename scalar_t>
struct Problem {
  const scalar_t* logits;
  const scalar_t* teacher_logits;  // or nullptr
  const int64_t* labels;
  Gradient<scalar_t>* gradient;  // or nullptr
  Accumulate<scalar_t>* loss;
  int64_t rows, classes;
  Real theta, alpha;  // alpha.data may be nullptr: then alpha_number
  double alpha_number;
  int64_t* kept;  // for one number, how many labels are not ignore_index; nullptr: all count
  int64_t ignore_index;
  bool row_losses, mean;  // one loss a row; or their sum, or their mean
  double scale;           // Eq. 2's -1/n, and 1 / rows for the mean without `kept`
  double* partial;        // for kMostBlocks numbers, the sums of the blocks
  unsigned* blocks_done;  // one 0 of our own, or nullptr: then `counter` of the device's counters
  unsigned counter;
};

// How many multiprocessors a device has.
int count_processors(int device);

// How many counters a device has.
constexpr unsigned kCounters = 1 << 16;

template <typename scalar_t>
void launch_loss(const Problem<scalar_t>& problem, int processors, cudaStream_t stream);

// gradient *= upstream, for `size` numbers from a 16-byte boundary.
template <typename scalar_t>
void launch_scale(scalar_t* gradient, int64_t size, Real upstream, cudaStream_t stream);

}  // namespace taylorglo
