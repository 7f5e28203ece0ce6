// What norm_relu.cpp, which knows PyTorch, and norm_relu.cu, which knows CUDA, say to each other.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace taylorglo {

// How the numbers are laid over the threads. A thread has a vector of channels and every so many
// rows; a block has a slice of up to kMostLanes vectors, 128 bytes of each of its rows. So few
// blocks share a slice, and each of them can add up what all have found.
struct Layout {
  static constexpr int kThreads = 256, kMostLanes = 8;
  static constexpr int kLeastRows = 4;  // a thread has at least, where there are several blocks

  int lanes = 1;      // vectors in a slice: a power of two
  int slices;         // blockIdx.y
  int found, filled;  // blocks a slice of the first and of the second kernel

  Layout(int64_t rows, int vectors, int processors) {
    while (lanes < std::min(kMostLanes, vectors)) lanes *= 2;
    slices = (vectors + lanes - 1) / lanes;
    const int64_t block_rows = int64_t(kThreads / lanes) * kLeastRows;
    const int64_t most = (rows + block_rows - 1) / block_rows;
    found = static_cast<int>(std::min<int64_t>(most, std::max(1, processors / slices)));
    filled = static_cast<int>(std::min<int64_t>(most, std::max(1, 2 * processors / slices)));
  }

  // A block of the first kernel leaves a record for the second: two numbers a channel, and how many
  // rows it had; from a 16-byte boundary.
  __host__ __device__ int record_size(int vector) const { return 2 * lanes * vector + 4; }
  __host__ __device__ int64_t record(int vector, int slice, int block) const {
    return (int64_t(slice) * found + block) * record_size(vector);
  }
};

// All pointers are to device memory: numbers in rows of `channels`, from 16-byte boundaries, and
// float32 numbers, one a channel.
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
