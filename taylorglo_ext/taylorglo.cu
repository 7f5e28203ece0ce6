// The CUDA kernels: one launch computes the loss and the gradient, one launch scales the gradient. The formula itself is in
// taylorglo.h; the checks, the memory and the stream are in taylorglo_cuda.cpp.
//
// A row belongs to a power of two of lanes of one warp, so that a warp has one long row or several short ones; a row that
// is too long for that belongs to a whole block. Nothing here reads a device value on the host, so that the launches can be
// captured in a graph.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "taylorglo.h"
#include "taylorglo_cuda.h"

namespace taylorglo {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128, kMostThreads = 512;
constexpr int64_t kMostCacheBytes = 32 << 10;

template <typename T>
__device__ T read_number(Real real) {
  return real.is_double ? T(*static_cast<const double*>(real.data)) : T(*static_cast<const float*>(real.data));
}

template <typename T>
__device__ Theta<T> read_theta(Real real) {
  return real.is_double ? load_theta<T>(static_cast<const double*>(real.data))
                        : load_theta<T>(static_cast<const float*>(real.data));
}

// ---- The softmax in one pass: the running maximum, and the sum of exp(z - maximum) -----------------------------------

__device__ __forceinline__ float exponential(float v) { return __expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

// exp(z - max), where z may be -inf. NaN if z is NaN or +inf, so that such a logit makes its row NaN.
template <typename T>
__device__ __forceinline__ T exp_difference(T z, T max) {
  return z == -INFINITY ? T(0) : exponential(z - max);
}

template <typename T>
struct MaxSum {
  T max, sum;

  __device__ __forceinline__ MaxSum operator+(const MaxSum& other) const {
    const T larger = ::max(max, other.max);
    return {larger, sum * exp_difference(max, larger) + other.sum * exp_difference(other.max, larger)};
  }
};

// ---- Sums over the threads of a row or of a block --------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffff, v, mask);
}
template <typename T>
__device__ __forceinline__ MaxSum<T> shuffle_xor(MaxSum<T> v, int mask) {
  return {shuffle_xor(v.max, mask), shuffle_xor(v.sum, mask)};
}

// The sum over each group of `lanes` neighbours. Every lane of the warp must come here.
template <typename V>
__device__ V sum_over_lanes(V v, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) v = v + shuffle_xor(v, mask);
  return v;
}

// The sum over the block, in a fixed order. Every thread of the block must come here.
template <typename V>
__device__ V sum_over_block(V v) {
  __shared__ V warps[kMostThreads / kWarp];
  v = sum_over_lanes(v, kWarp);
  __syncthreads();  // until all have read the previous call's result
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = warps[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; ++w) v = v + warps[w];
  return v;
}

template <bool kBlockRow, typename V>
__device__ V sum_over_row(V v, int lanes) {
  if constexpr (kBlockRow) {
    return sum_over_block(v);
  } else {
    return sum_over_lanes(v, lanes);
  }
}

// ---- A row, as one of its threads sees it ----------------------------------------------------------------------------

template <typename scalar_t, int kVector>
struct alignas(sizeof(scalar_t) * kVector) Packed {  // 16 bytes, or one number
  scalar_t value[kVector];
};

// Thread `lane` has the vectors lane, lane + lanes, ...: its `step`-th is vector lane + step * lanes. The first pass reads
// memory and, if there is a cache, keeps the numbers in the thread's own column of shared memory; later passes read them
// there, without a conflict or a barrier.
template <typename scalar_t, int kVector>
struct Row {
  using T = Accumulate<scalar_t>;
  const scalar_t* source;
  T* cache;  // the thread's column, or nullptr

  __device__ __forceinline__ void read_memory(int64_t vector, T (&numbers)[kVector]) const {
    const auto packed = *reinterpret_cast<const Packed<scalar_t, kVector>*>(source + vector * kVector);
#pragma unroll
    for (int k = 0; k < kVector; ++k) numbers[k] = static_cast<T>(packed.value[k]);
  }

  __device__ __forceinline__ void read_first(int64_t vector, int step, T (&numbers)[kVector]) const {
    read_memory(vector, numbers);
    if (!cache) return;
#pragma unroll
    for (int k = 0; k < kVector; ++k) cache[(step * kVector + k) * blockDim.x] = numbers[k];
  }

  __device__ __forceinline__ void read_again(int64_t vector, int step, T (&numbers)[kVector]) const {
    if (!cache) return read_memory(vector, numbers);
#pragma unroll
    for (int k = 0; k < kVector; ++k) numbers[k] = cache[(step * kVector + k) * blockDim.x];
  }

  // This thread's share of the softmax; the first pass.
  __device__ MaxSum<T> max_sum(int64_t vectors, int lane, int lanes) const {
    MaxSum<T> total{-INFINITY, 0};
    int step = 0;
    for (int64_t vector = lane; vector < vectors; vector += lanes, ++step) {
      T z[kVector];
      read_first(vector, step, z);
      MaxSum<T> part{z[0], 0};
#pragma unroll
      for (int k = 1; k < kVector; ++k) part.max = ::max(part.max, z[k]);
#pragma unroll
      for (int k = 0; k < kVector; ++k) part.sum += exp_difference(z[k], part.max);
      total = total + part;
    }
    return total;
  }
};

// ---- The loss --------------------------------------------------------------------------------------------------------

// This thread's share of the sum of f over one row; writes its share of the row's gradient. There may be no such row.
template <typename scalar_t, int kVector, bool kBlockRow, typename T>
__device__ T row_sum(const Problem<scalar_t>& p, int lanes, const Theta<T>& theta, T alpha, int64_t row, T* cache) {
  const bool exists = row < p.rows, distilled = p.teacher_logits != nullptr;
  const int lane = threadIdx.x % lanes;
  const int64_t vectors = exists ? p.classes / kVector : 0;
  const int64_t steps = (p.classes / kVector + lanes - 1) / lanes;
  const Row<scalar_t, kVector> logits{p.logits + row * p.classes, cache};
  const Row<scalar_t, kVector> teacher{p.teacher_logits + row * p.classes,
                                       cache ? cache + steps * kVector * blockDim.x : nullptr};

  const MaxSum<T> softmax = sum_over_row<kBlockRow>(logits.max_sum(vectors, lane, lanes), lanes);
  MaxSum<T> teacher_softmax{0, 1};
  if (distilled) teacher_softmax = sum_over_row<kBlockRow>(teacher.max_sum(vectors, lane, lanes), lanes);
  const T factor = 1 / softmax.sum, teacher_factor = alpha / teacher_softmax.sum;

  // A label outside [0, classes) makes its row NaN, and with it the loss.
  const int64_t label = exists ? p.labels[row] : 0;
  const T wrong = label >= 0 && label < p.classes ? T(0) : T(NAN);
  const Cubic<T, T> own(theta, 1 + wrong), other(theta, wrong);  // one-hot: the label's class, and the other classes

  // visit(vector, predictions, cubics) for each vector of this thread.
  const auto each_vector = [&](auto visit) {
    int step = 0;
    for (int64_t vector = lane; vector < vectors; vector += lanes, ++step) {
      T z[kVector], t[kVector], y[kVector];
      Cubic<T, T> cubic[kVector];
      logits.read_again(vector, step, z);
      if (distilled) teacher.read_again(vector, step, t);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const bool is_label = vector * kVector + k == label;
        y[k] = exp_difference(z[k], softmax.max) * factor;
        cubic[k] = is_label ? own : other;
        if (distilled) {
          const T teacher_y = exp_difference(t[k], teacher_softmax.max) * teacher_factor;
          cubic[k] = Cubic<T, T>(theta, teacher_y + (is_label ? 1 - alpha : T(0)) + wrong);  // Eq. 3
        }
      }
      visit(vector, y, cubic);
    }
  };

  T sum = 0, dot = 0;
  each_vector([&](int64_t, const T(&y)[kVector], const Cubic<T, T>(&cubic)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      sum += cubic[k].f(y[k]);             // Eq. 2
      dot += cubic[k].df_dy(y[k]) * y[k];  // sum_i G_i y_i
    }
  });
  if (!p.gradient) return sum;

  dot = sum_over_row<kBlockRow>(dot, lanes);
  const T scale = static_cast<T>(p.scale);
  auto* gradient = reinterpret_cast<Packed<scalar_t, kVector>*>(p.gradient + row * p.classes);
  each_vector([&](int64_t vector, const T(&y)[kVector], const Cubic<T, T>(&cubic)[kVector]) {
    Packed<scalar_t, kVector> packed;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      packed.value[k] = static_cast<scalar_t>(scale * y[k] * (cubic[k].df_dy(y[k]) - dot));
    }
    gradient[vector] = packed;
  });
  return sum;
}

// Adds up the threads' sums and writes the loss. The last block to arrive adds up the blocks, in order.
template <typename scalar_t>
__device__ void finish(const Problem<scalar_t>& p, double sum) {
  __shared__ bool is_last;
  sum = sum_over_block(sum);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      p.partial[blockIdx.x] = sum;
      __threadfence();
      is_last = atomicAdd(p.blocks_done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    sum = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) sum += __ldcg(p.partial + block);
    sum = sum_over_block(sum);
  }
  if (threadIdx.x == 0) *p.loss = static_cast<Accumulate<scalar_t>>(sum * p.scale);
}

template <typename scalar_t, int kVector, bool kBlockRow>
__global__ void __launch_bounds__(kMostThreads) loss_kernel(const Problem<scalar_t> p, int lanes) {
  using T = Accumulate<scalar_t>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* cache = kBlockRow ? nullptr : reinterpret_cast<T*>(shared) + threadIdx.x;
  const Theta<T> theta = read_theta<T>(p.theta);
  const T alpha = p.alpha.data ? read_number<T>(p.alpha) : static_cast<T>(p.alpha_number);
  const int64_t block_rows = blockDim.x / lanes;
  double sum = 0;
  // Every thread of a block takes every turn of this loop, for the sums over rows.
  for (int64_t first = blockIdx.x * block_rows; first < p.rows; first += gridDim.x * block_rows) {
    sum += row_sum<scalar_t, kVector, kBlockRow>(p, lanes, theta, alpha, first + threadIdx.x / lanes, cache);
  }
  finish(p, sum);
}

// How a batch is laid over the threads.
struct Plan {
  bool block_row;
  int lanes, threads;
  unsigned blocks;
  int64_t cache_bytes;
};

Plan make_plan(int64_t rows, int64_t vectors, int64_t vector_bytes) {
  Plan plan{false, 1, kThreads, 1, 0};
  while (plan.lanes < kWarp && plan.lanes * 4 < vectors) plan.lanes *= 2;  // up to 4 vectors a lane in short rows
  const int64_t thread_bytes = (vectors + plan.lanes - 1) / plan.lanes * vector_bytes;
  const int64_t all_threads = (rows * plan.lanes + kWarp - 1) / kWarp * kWarp;
  if (all_threads <= kMostThreads && all_threads * thread_bytes <= kMostCacheBytes) {
    plan.threads = static_cast<int>(std::max<int64_t>(all_threads, kWarp));  // one block, which need not wait for others
  }
  plan.cache_bytes = plan.threads * thread_bytes;
  if (plan.cache_bytes > kMostCacheBytes) plan = {true, kMostThreads, kMostThreads, 1, 0};
  const int64_t block_rows = plan.threads / plan.lanes;
  plan.blocks = static_cast<unsigned>(std::clamp<int64_t>((rows + block_rows - 1) / block_rows, 1, kMostBlocks));
  return plan;
}

template <typename scalar_t, int kVector>
void launch(const Problem<scalar_t>& p, cudaStream_t stream) {
  const int64_t numbers = p.teacher_logits ? 2 * kVector : kVector;
  const Plan plan = make_plan(p.rows, p.classes / kVector, numbers * sizeof(Accumulate<scalar_t>));
  if (plan.blocks > 1) cudaMemsetAsync(p.blocks_done, 0, sizeof(unsigned), stream);
  const auto kernel = plan.block_row ? loss_kernel<scalar_t, kVector, true> : loss_kernel<scalar_t, kVector, false>;
  kernel<<<plan.blocks, plan.threads, plan.cache_bytes, stream>>>(p, plan.lanes);
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// ---- The backward ----------------------------------------------------------------------------------------------------

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) scale_kernel(scalar_t* gradient, int64_t size, Real upstream) {
  using T = Accumulate<scalar_t>;
  const T factor = read_number<T>(upstream);
  if (factor == 1) return;  // the usual case: loss.backward() with nothing after the loss
  constexpr int kVector = 16 / sizeof(scalar_t);
  auto* vectors = reinterpret_cast<Packed<scalar_t, kVector>*>(gradient);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < size / kVector; i += threads) {
    auto packed = vectors[i];
#pragma unroll
    for (int k = 0; k < kVector; ++k) packed.value[k] = static_cast<scalar_t>(factor * static_cast<T>(packed.value[k]));
    vectors[i] = packed;
  }
  for (int64_t i = size / kVector * kVector + thread; i < size; i += threads) {
    gradient[i] = static_cast<scalar_t>(factor * static_cast<T>(gradient[i]));
  }
}

}  // namespace

template <typename scalar_t>
void launch_loss(const Problem<scalar_t>& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  const bool vectors = p.classes % kVector == 0 && is_aligned(p.logits) && is_aligned(p.teacher_logits);
  vectors ? launch<scalar_t, kVector>(p, stream) : launch<scalar_t, 1>(p, stream);
}

template <typename scalar_t>
void launch_scale(scalar_t* gradient, int64_t size, Real upstream, cudaStream_t stream) {
  const int64_t blocks = (size + kThreads * 8 - 1) / (kThreads * 8);
  scale_kernel<<<std::min(blocks, kMostBlocks), kThreads, 0, stream>>>(gradient, size, upstream);
}

#define TAYLORGLO_INSTANTIATE(scalar_t)                              \
  template void launch_loss(const Problem<scalar_t>&, cudaStream_t); \
  template void launch_scale(scalar_t*, int64_t, Real, cudaStream_t);
TAYLORGLO_INSTANTIATE(double)
TAYLORGLO_INSTANTIATE(float)
TAYLORGLO_INSTANTIATE(c10::Half)
TAYLORGLO_INSTANTIATE(c10::BFloat16)

}  // namespace taylorglo
