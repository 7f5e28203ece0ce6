// The interface between taylorglo_cuda.cpp, which uses PyTorch, and taylorglo.cu, which has the
// kernels. They are apart because nvcc needs twenty seconds for PyTorch's headers.
#pragma once

#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

namespace taylorglo {

template <typename scalar_t>
using Accumulate = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// float16 cannot hold the small numbers of a gradient before a loss scale raises them.
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
  int64_t* kept;  // where to count the labels that are not ignore_index; nullptr: all count
  int64_t ignore_index;
  bool row_losses, mean;  // one loss for each row; else their mean or their sum
  double scale;           // Eq. 2's -1/n, for the mean without `kept` also 1 / rows
  double* partial;        // kMostBlocks numbers: the sums of the blocks
  unsigned* blocks_done;  // a 0 for this launch, or nullptr: then the device's counter `counter`
  unsigned counter;
};

// The number of a device's multiprocessors.
int count_processors(int device);

// The number of a device's counters.
constexpr unsigned kCounters = 1 << 16;

template <typename scalar_t>
void launch_loss(const Problem<scalar_t>& problem, int processors, cudaStream_t stream);

// gradient *= upstream, for `size` numbers from a 16-byte boundary.
template <typename scalar_t>
void launch_scale(scalar_t* gradient, int64_t size, Real upstream, cudaStream_t stream);

}  // namespace taylorglo
