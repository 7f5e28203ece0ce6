// The interface between norm_relu.cpp, which uses PyTorch, and norm_relu.cu, which has the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace taylorglo {

// Which thread has which numbers. A thread has one vector of channels in some of the rows. A block
// has a slice of up to kMostLanes vectors, 128 bytes of each of its rows. Few blocks share a slice,
// so each of them can add up the results of all.
struct Layout {
  static constexpr int kThreads = 256, kMostLanes = 8;
  static constexpr int kLeastRows = 4;  // of a thread, where there are several blocks

  int lanes = 1;      // vectors in a slice: a power of two
  int slices;         // blockIdx.y
  int found, filled;  // blocks for each slice in the first and in the second kernel

  Layout(int64_t rows, int vectors, int processors) {
    while (lanes < std::min(kMostLanes, vectors)) lanes *= 2;
    slices = (vectors + lanes - 1) / lanes;
    const int64_t block_rows = int64_t(kThreads / lanes) * kLeastRows;
    const int64_t most = (rows + block_rows - 1) / block_rows;
    found = static_cast<int>(std::min<int64_t>(most, std::max(1, processors / slices)));
    filled = static_cast<int>(std::min<int64_t>(most, std::max(1, 2 * processors / slices)));
  }

  // A block of the first kernel writes a record for the second: two numbers for each channel, and
  // its number of rows. A record starts at a 16-byte boundary.
  __host__ __device__ int record_size(int vector) const { return 2 * lanes * vector + 4; }
  __host__ __device__ int64_t record(int vector, int slice, int block) const {
    return (int64_t(slice) * found + block) * record_size(vector);
  }
};

// All pointers are to device memory. Arrays of scalar_t are rows of `channels` numbers and start at
// 16-byte boundaries; arrays of float have one number for each channel.
template <typename scalar_t>
struct NormRelu {
  const scalar_t* x;
  const scalar_t* shortcut;  // or nullptr
  scalar_t* y;
  const float *weight, *bias;
  float *running_mean, *running_var;
  float* saved;    // the means and then 1 / standard deviation
  float* records;  // slices * found of them
  unsigned rows;
  int channels;
  Layout layout;
  float eps, momentum, unbiased;  // unbiased: rows / (rows - 1)
};

template <typename scalar_t>
struct NormReluBackward {
  const scalar_t *dy, *x;
  const scalar_t* y;    // with a shortcut, or nullptr
  scalar_t* dshortcut;  // likewise
  scalar_t* dx;
  const float *weight, *bias, *saved;
  float *dweight, *dbias;
  float* records;
  unsigned rows;
  int channels;
  Layout layout;
};

template <typename scalar_t>
void launch(const NormRelu<scalar_t>& problem, cudaStream_t stream);

template <typename scalar_t>
void launch(const NormReluBackward<scalar_t>& problem, cudaStream_t stream);

}  // namespace taylorglo
