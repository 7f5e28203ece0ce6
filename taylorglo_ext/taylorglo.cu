// The CUDA kernels: one launch computes the loss and the gradient, another scales the gradient. With
// an ignore_index the mean needs a launch more, which counts labels. The formula is in taylorglo.h;
// checks, memory and stream are in taylorglo_cuda.cpp. The host reads no device value here, so a
// graph can capture the launches.
//
// A power of two of lanes of one warp shares a row: a warp has one long row or several short ones.
// A block shares a longer row. Each thread reads its numbers once, keeps them in registers and
// computes their exponentials once, against its own maximum. Then one exchange between the threads
// gives the row's maximum and moments. Only a row that is too long for a block's registers is read
// twice.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "packed.h"
#include "taylorglo.h"
#include "taylorglo_cuda.h"

namespace taylorglo {
namespace {

constexpr int kWarp = 32;
template <typename T>
constexpr int kMostThreads =
    sizeof(T) == 8 ? 256 : 1024;  // at most 64 registers for each, of float
template <typename T>
constexpr int kMostWarpThreads = sizeof(T) == 8 ? 128 : 512;  // where rows belong to warps
constexpr int kMostColumns = 512;  // 48 KB hold their columns
template <typename T, bool kTeacher>  // where a row belongs to a block
constexpr int kMostRowThreads =
    kTeacher ? std::min(kMostColumns, kMostThreads<T>) : kMostThreads<T>;

enum class Scope { kWarpRows, kBlockRow, kLongRow };

template <typename T>
__device__ T read_number(Real real) {
  return real.is_double ? T(*static_cast<const double*>(real.data))
                        : T(*static_cast<const float*>(real.data));
}

template <typename T>
__device__ Polynomial<T> read_theta(Real real) {
  return real.is_double ? Polynomial<T>(static_cast<const double*>(real.data))
                        : Polynomial<T>(static_cast<const float*>(real.data));
}

template <typename scalar_t>
__device__ Accumulate<scalar_t> read_alpha(const Problem<scalar_t>& p) {
  using T = Accumulate<scalar_t>;
  return p.alpha.data ? read_number<T>(p.alpha) : static_cast<T>(p.alpha_number);
}

__device__ __forceinline__ float exponential(float v) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(v * 1.44269504f));
  return v;
#else
  return std::exp(v);
#endif
}
__device__ __forceinline__ double exponential(double v) { return exp(v); }

__device__ __forceinline__ float reciprocal(float v) { return __fdividef(1.f, v); }
__device__ __forceinline__ double reciprocal(double v) { return 1 / v; }

__device__ __forceinline__ void prefetch(const void* data) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L1 [%0];" ::"l"(data));
#endif
}

// ---- One thread's numbers of a row --------------------------------------------------------------

// Reads every kStride-th vector from `row` on, where `left` vectors are left. Missing numbers are
// minus infinity, whose exponential is 0. A stride that the compiler knows needs no arithmetic.
template <int kVector, int kStride, int kNumbers, typename scalar_t, typename T>
__device__ __forceinline__ void load(const scalar_t* row, int left, T (&numbers)[kNumbers]) {
#pragma unroll
  for (int s = 0; s < kNumbers / kVector; ++s) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) numbers[s * kVector + k] = -INFINITY;
    if (left > s * kStride) {
      const auto packed = reinterpret_cast<const Packed<scalar_t, kVector>*>(row)[s * kStride];
#pragma unroll
      for (int k = 0; k < kVector; ++k) numbers[s * kVector + k] = static_cast<T>(packed.value[k]);
    }
  }
}

template <int kNumbers, typename T>
__device__ __forceinline__ T largest(T max, const T (&numbers)[kNumbers]) {
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) max = ::max(max, numbers[i]);
  return max;
}

// exp(number - max) in place: 0 for minus infinity, NaN for infinity and NaN.
template <int kNumbers, typename T>
__device__ __forceinline__ void exponentiate(T (&numbers)[kNumbers], T max) {
  if (max == -INFINITY) max = 0;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) numbers[i] = exponential(numbers[i] - max);
}

// The factor that turns exponentials against `max` into exponentials against a larger maximum.
template <typename T>
__device__ __forceinline__ T ratio(T max, T larger) {
  return max == larger ? T(1) : exponential(max - larger);
}

// A thread's own column of shared memory, where the teacher's numbers wait for the second step.
template <int kNumbers, typename T>
struct Column {
  static constexpr int kVector = 16 / sizeof(T);
  Packed<T, kVector>* vectors;

  __device__ __forceinline__ void write(const T (&numbers)[kNumbers]) const {
#pragma unroll
    for (int s = 0; s < kNumbers / kVector; ++s) {
      Packed<T, kVector> packed;
#pragma unroll
      for (int k = 0; k < kVector; ++k) packed.value[k] = numbers[s * kVector + k];
      vectors[s * blockDim.x] = packed;
    }
    fence();
  }

  __device__ __forceinline__ void read(T (&numbers)[kNumbers]) const {
    fence();
#pragma unroll
    for (int s = 0; s < kNumbers / kVector; ++s) {
      const auto packed = vectors[s * blockDim.x];
#pragma unroll
      for (int k = 0; k < kVector; ++k) numbers[s * kVector + k] = packed.value[k];
    }
  }

  // For the compiler only, which would keep the numbers in registers.
  __device__ __forceinline__ static void fence() { asm volatile("" ::: "memory"); }
};

// ---- Sums over threads --------------------------------------------------------------------------

// The moments against the maxima of the logits and of the teacher's logits, at first of no numbers.
template <typename T, bool kTeacher>
struct Share {
  T max = -INFINITY, teacher_max = -INFINITY;
  Moments<T, kTeacher> moments;

  __device__ __forceinline__ void raise(T new_max, T new_teacher_max) {
    moments.scale(ratio(max, new_max), kTeacher ? ratio(teacher_max, new_teacher_max) : T(1));
    max = new_max;
    teacher_max = new_teacher_max;
  }

  // Adds up the shares of `lanes` neighbours. Every lane of the warp must call this.
  __device__ __forceinline__ void join(int lanes) {
    T most = max, teacher_most = teacher_max;
#pragma unroll
    for (int mask = 1; mask < lanes; mask *= 2) {
      most = ::max(most, shuffle_xor(most, mask));
      if constexpr (kTeacher) teacher_most = ::max(teacher_most, shuffle_xor(teacher_most, mask));
    }
    raise(most, teacher_most);
#pragma unroll
    for (int mask = 1; mask < lanes; mask *= 2) {
#pragma unroll
      for (T& sum : moments.sum) sum += shuffle_xor(sum, mask);
    }
  }
};

// Adds up the shares of the whole block. Every thread of the block must call this.
template <typename T, bool kTeacher>
__device__ __forceinline__ void join_block(Share<T, kTeacher>& share) {
  __shared__ T numbers[Moments<T, kTeacher>::kCount + 2][kWarp];
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;  // powers of two
  share.join(kWarp);
  __syncthreads();  // all threads have read the previous row's numbers
  if (lane == 0) {
    const int warp = threadIdx.x / kWarp;
    numbers[0][warp] = share.max;
    numbers[1][warp] = share.teacher_max;
#pragma unroll
    for (int i = 0; i < share.moments.kCount; ++i) numbers[i + 2][warp] = share.moments.sum[i];
  }
  __syncthreads();
  share.max = numbers[0][lane % warps];
  share.teacher_max = numbers[1][lane % warps];
#pragma unroll
  for (int i = 0; i < share.moments.kCount; ++i)
    share.moments.sum[i] = numbers[i + 2][lane % warps];
  share.join(warps);
}

// The sum over the block in thread 0, in a fixed order. Every thread must call this.
__device__ double sum_over_block(double v) {
  __shared__ double warps[kWarp];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  __syncthreads();  // all threads have read the previous call's result
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = 0;
  if (threadIdx.x == 0) {
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) v += warps[w];
  }
  return v;
}

// ---- The loss -----------------------------------------------------------------------------------

// Eq. 2's -1/n, for the mean also divided by the number of rows.
template <typename scalar_t>
__device__ __forceinline__ double loss_scale(const Problem<scalar_t>& p) {
  return p.mean && p.kept ? p.scale / static_cast<double>(*p.kept) : p.scale;
}

// The parameters are in shared memory, since the numbers fill the registers.
template <typename T>
struct Parameters {
  Polynomial<T> polynomial;
  alignas(8) T alpha, scale;  // aligned, or the compiler runs out of registers elsewhere
  int classes;

  template <bool kTeacher, typename scalar_t>
  __device__ __forceinline__ void read(const Problem<scalar_t>& p) {
    *this = {read_theta<T>(p.theta), kTeacher ? read_alpha(p) : T(0), T(loss_scale(p)),
             static_cast<int>(p.classes)};
  }
};

// A thread with few numbers has registers left to read the parameters while the numbers arrive.
template <int kNumbers, Scope kScope>
constexpr bool kReadsLate = kScope == Scope::kWarpRows && kNumbers <= 8;

// The places of a thread's numbers of one row. With many numbers, each step of the work computes
// the places anew, from memory: otherwise the compiler would keep every comparison with the row's
// end from the load to the store.
template <int kVector, int kNumbers, int kLanes, Scope kScope>
struct Place {
  static constexpr int kSteps = kNumbers / kVector;
  int classes, vectors, mine, first = 0;
  int64_t start;

  template <typename T>
  __device__ __forceinline__ Place(int number, const Parameters<T>& parameters, int row,
                                   bool exists) {
    classes = kReadsLate<kNumbers, kScope>
                  ? number
                  : *const_cast<const volatile int*>(&parameters.classes);
    vectors = exists ? classes / kVector : 0;
    start = exists ? int64_t(row) * classes : 0;
    // The lanes of a warp, or kLanes of them, have neighbouring vectors. The warps of a block have
    // consecutive parts of the row.
    mine = threadIdx.x % kLanes;
    if constexpr (kScope != Scope::kWarpRows) mine += threadIdx.x / kWarp * kWarp * kSteps;
  }

  // A row that is too long for the block's registers has several tiles, else one.
  __device__ __forceinline__ bool next() {
    const int tile = static_cast<int>(blockDim.x) * kSteps;
    first += tile;
    mine += tile;
    return kScope == Scope::kLongRow && first < vectors;
  }

  template <typename scalar_t, typename T>
  __device__ __forceinline__ void read(const scalar_t* data, T (&numbers)[kNumbers]) const {
    load<kVector, kLanes>(data + start + int64_t(mine) * kVector, vectors - mine, numbers);
  }
};

// The first pass: a thread's exponentials, e of the logits and h of the teacher's, against its own
// maxima, and their moments. If `reads`, thread 0 reads the parameters while the numbers arrive.
template <int kVector, int kNumbers, int kLanes, Scope kScope, int kH, bool kTeacher,
          typename scalar_t, typename T>
__device__ __forceinline__ void find_moments(const Problem<scalar_t>& p, Parameters<T>& parameters,
                                             bool reads,
                                             Place<kVector, kNumbers, kLanes, kScope> from,
                                             T (&e)[kNumbers], T (&h)[kH],
                                             Share<T, kTeacher>& share) {
  do {
    from.read(p.logits, e);
    if constexpr (kTeacher) from.read(p.teacher_logits, h);
    if (reads && threadIdx.x == 0) parameters.template read<kTeacher>(p);
    const T max = largest(share.max, e),
            teacher_max = kTeacher ? largest(share.teacher_max, h) : T(0);
    if constexpr (kScope == Scope::kLongRow) {
      share.raise(max, teacher_max);
    } else {
      share.max = max;
      share.teacher_max = teacher_max;
    }
    exponentiate(e, max);
    if constexpr (kTeacher) exponentiate(h, teacher_max);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) share.moments.add(e[i], h[kTeacher ? i : 0]);
  } while (from.next());
}

// The second pass: writes a thread's part of the gradient. e and h are its exponentials against max
// and teacher_max; those of a long row are read again. A label is treated like any other class;
// then the thread that wrote it corrects it.
template <int kVector, int kNumbers, int kLanes, Scope kScope, int kH, bool kTeacher,
          typename scalar_t, typename T>
__device__ __forceinline__ void write_gradient(const Problem<scalar_t>& p,
                                               Place<kVector, kNumbers, kLanes, kScope> to,
                                               T (&e)[kNumbers], T (&h)[kH], T max, T teacher_max,
                                               const Slope<T, T, kTeacher>& slope, bool has_label,
                                               int label, Gradient<scalar_t> label_gradient) {
  do {
    if constexpr (kScope == Scope::kLongRow) {
      to.read(p.logits, e);
      exponentiate(e, max);
      if constexpr (kTeacher) {
        to.read(p.teacher_logits, h);
        exponentiate(h, teacher_max);
      }
    }
    using Vector = Packed<Gradient<scalar_t>, kVector>;
    auto* gradient = reinterpret_cast<Vector*>(p.gradient + to.start) + to.mine;
#pragma unroll
    for (int s = 0; s < to.kSteps; ++s) {
      Vector packed;
      T numbers[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const int i = s * kVector + k;
        numbers[k] = slope(e[i], h[kTeacher ? i : 0]);
      }
      round_vector(numbers, packed);
      if (to.vectors - to.mine > s * kLanes) gradient[s * kLanes] = packed;
    }
    const int away = label / kVector - to.mine;
    if (has_label && away >= 0 && away < kLanes * to.kSteps && away % kLanes == 0) {
      p.gradient[to.start + label] = label_gradient;
    }
  } while (to.next());
}

// A thread's work on a row: it writes its part of the gradient. The row's first thread returns the
// row's sum of f, the others 0. If `reads`, thread 0 reads the parameters.
template <int kVector, int kNumbers, int kLanes, bool kTeacher, Scope kScope, typename scalar_t,
          typename T>
__device__ __forceinline__ T do_row(const Problem<scalar_t>& p, Parameters<T>& parameters, int row,
                                    bool reads) {
  using Here = Place<kVector, kNumbers, kLanes, kScope>;
  const bool exists = row < static_cast<int>(p.rows);
  prefetch(p.labels + (exists ? row : 0));

  T e[kNumbers], h[kTeacher ? kNumbers : 1];
  Share<T, kTeacher> share;
  const Here from(static_cast<int>(p.classes), parameters, row, exists);
  find_moments(p, parameters, reads, from, e, h, share);
  extern __shared__ __align__(16) unsigned char columns[];
  const Column<kNumbers, T> column{
      reinterpret_cast<Packed<T, Column<kNumbers, T>::kVector>*>(columns) + threadIdx.x};
  if constexpr (kTeacher && kScope != Scope::kLongRow) column.write(h);

  const T max = share.max, teacher_max = share.teacher_max;
  if constexpr (kScope == Scope::kWarpRows) {
    share.join(kLanes);
    if (reads) __syncthreads();  // now the parameters are there
  } else {
    join_block(share);
  }
  const Here to(static_cast<int>(p.classes), parameters, row, exists);
  const int64_t any_label = exists ? p.labels[row] : 0;
  const bool inside = any_label >= 0 && any_label < to.classes;
  const bool ignored = !exists || (p.kept && any_label == p.ignore_index);
  const int label = inside ? static_cast<int>(any_label) : 0;
  const Polynomial<T>& polynomial = parameters.polynomial;
  const T y_factor = reciprocal(share.moments.sum[share.moments.kE]);
  const T e_label = ratio(static_cast<T>(p.logits[to.start + label]), share.max);
  T x_factor = 0, h_label = 0;
  if constexpr (kTeacher) {
    x_factor = parameters.alpha * reciprocal(share.moments.sum[share.moments.kH]);
    h_label = ratio(static_cast<T>(p.teacher_logits[to.start + label]), share.teacher_max);
  }
  Row<T, T, kTeacher> result(polynomial, share.moments, static_cast<T>(to.classes),
                             kTeacher ? parameters.alpha : T(0), y_factor, x_factor, e_label,
                             h_label);
  if (!inside && !ignored) result.f = result.dot = NAN;  // this makes the loss NaN
  const T f = to.mine == 0 && !ignored ? result.f : T(0);
  if (!p.gradient) return f;

  const T scale = ignored ? T(0) : parameters.scale;
  const Slope<T, T, kTeacher> label_slope(polynomial, result.dot - result.label_df, scale, y_factor,
                                          x_factor);
  const auto label_gradient = static_cast<Gradient<scalar_t>>(label_slope(e_label, h_label));
  const Slope<T, T, kTeacher> slope(
      polynomial, result.dot, scale, y_factor * ratio(max, share.max),
      kTeacher ? x_factor * ratio(teacher_max, share.teacher_max) : T(0));
  if constexpr (kTeacher && kScope != Scope::kLongRow) column.read(h);
  write_gradient(p, to, e, h, max, teacher_max, slope, inside && exists, label, label_gradient);
  return f;
}

__device__ unsigned counters[kCounters];

// Adds up the threads' sums and writes the loss. The last block to arrive adds up the blocks in
// order, and sets the count of blocks back to 0 for the next launch.
template <typename scalar_t>
__device__ __forceinline__ void finish(const Problem<scalar_t>& p, double sum) {
  __shared__ bool is_last;
  sum = sum_over_block(sum);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      p.partial[blockIdx.x] = sum;
      __threadfence();
      unsigned* done = p.blocks_done ? p.blocks_done : counters + p.counter;
      is_last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    sum = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) sum += __ldcg(p.partial + b);
    sum = sum_over_block(sum);
  }
  if (threadIdx.x == 0) *p.loss = static_cast<Accumulate<scalar_t>>(sum * loss_scale(p));
}

template <typename scalar_t, int kVector, int kNumbers, int kLanes, bool kTeacher, Scope kScope>
__global__ void __launch_bounds__(kScope == Scope::kWarpRows
                                      ? kMostWarpThreads<Accumulate<scalar_t>>
                                      : kMostThreads<Accumulate<scalar_t>>,
                                  kScope == Scope::kWarpRows && sizeof(scalar_t) < 8 ? 2 : 1)
    loss_kernel(const __grid_constant__ Problem<scalar_t> p) {
  using T = Accumulate<scalar_t>;
  __shared__ Parameters<T> parameters;
  if constexpr (!kReadsLate<kNumbers, kScope>) {
    if (threadIdx.x == 0) parameters.template read<kTeacher>(p);
    __syncthreads();
  }
  const int row_threads = kScope == Scope::kWarpRows ? kLanes : blockDim.x;
  const int block_rows = blockDim.x / row_threads;
  const int rows = static_cast<int>(p.rows);
  double sum = 0;
  // Every thread of a block takes part in every turn, for the sums over a row's threads.
  const int begin = blockIdx.x * block_rows;
  for (int first = begin; first < rows; first += gridDim.x * block_rows) {
    const int row = first + threadIdx.x / row_threads;
    const T f = do_row<kVector, kNumbers, kLanes, kTeacher, kScope>(
        p, parameters, row, kReadsLate<kNumbers, kScope> && first == begin);
    if (p.row_losses && threadIdx.x % row_threads == 0 && row < rows)
      p.loss[row] = f * parameters.scale;
    sum += f;
  }
  if (!p.row_losses) finish(p, sum);
}

// *kept = the number of labels that are not ignore_index. For one block.
__global__ void __launch_bounds__(1024)
    count_kernel(const int64_t* labels, int64_t rows, int64_t ignore_index, int64_t* kept) {
  int count = 0;  // rows < 2^30
#pragma unroll 16  // 16 labels are read at once
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x)
    count += labels[row] != ignore_index;
  const double total = sum_over_block(count);
  if (threadIdx.x == 0) *kept = static_cast<int64_t>(total);
}

// ---- Which threads have which rows --------------------------------------------------------------

template <int kVector, int kNumbers, int kLanes, bool kTeacher, Scope kScope = Scope::kWarpRows,
          typename scalar_t>
void start(const Problem<scalar_t>& p, int processors, cudaStream_t stream) {
  using T = Accumulate<scalar_t>;
  int threads;
  if constexpr (kScope == Scope::kWarpRows) {
    // If one block is enough, it has no other to wait for.
    constexpr int kMost = kMostWarpThreads<T>;
    const int64_t wanted = p.rows * kLanes;
    threads = wanted > int64_t(processors) * 1024 ? std::min(kMost, 256) : std::min(kMost, 128);
    if (wanted <= kMost) {
      for (threads = kWarp; threads < wanted;) threads *= 2;
    }
  } else {
    threads = 2 * kWarp;
    while (threads < kMostRowThreads<T, kTeacher> && threads * kNumbers < p.classes) threads *= 2;
  }
  const int64_t block_rows = kScope == Scope::kWarpRows ? threads / kLanes : 1;
  const int64_t resident = int64_t(processors) * 1024 / threads;
  const int64_t wanted = (p.rows + block_rows - 1) / block_rows;
  const auto blocks = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(resident, kMostBlocks));
  constexpr bool kColumns = kTeacher && kScope != Scope::kLongRow;
  constexpr int column_bytes = kColumns ? kNumbers * sizeof(T) : 0;
  loss_kernel<scalar_t, kVector, kNumbers, kLanes, kTeacher, kScope>
      <<<static_cast<unsigned>(blocks), threads, column_bytes * threads, stream>>>(p);
}

template <int kVector, bool kTeacher, typename scalar_t>
void choose(const Problem<scalar_t>& p, int processors, cudaStream_t stream) {
  using T = Accumulate<scalar_t>;
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr int kFew = kVector == 8 ? 8 : 4, kSome = kDouble ? 8 : 16,
                kMany = kDouble    ? 8
                        : kTeacher ? 16
                                   : 32;
  // Few numbers for each lane mean the least delay, many the least work beside them.
  const bool is_small = p.rows * kWarp <= int64_t(processors) * 1024;
  if (p.classes <= 4 * kFew) {
    start<kVector, kFew, 4, kTeacher>(p, processors, stream);
  } else if (p.classes <= kWarp * kFew && is_small) {
    start<kVector, kFew, kWarp, kTeacher>(p, processors, stream);
  } else if (p.classes <= 8 * kSome) {
    start<kVector, kSome, 8, kTeacher>(p, processors, stream);
  } else if (p.classes <= kWarp * kSome) {
    start<kVector, kSome, kWarp, kTeacher>(p, processors, stream);
  } else if (p.classes <= kWarp * kMany) {
    start<kVector, kMany, kWarp, kTeacher>(p, processors, stream);
  } else if (p.classes <= kMostRowThreads<T, kTeacher> * kMany) {
    start<kVector, kMany, kWarp, kTeacher, Scope::kBlockRow>(p, processors, stream);
  } else {
    start<kVector, kFew, kWarp, kTeacher, Scope::kLongRow>(p, processors, stream);
  }
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// ---- The backward -------------------------------------------------------------------------------

constexpr int kScaleThreads = 512, kScaleBlocks = 512;

template <typename scalar_t>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(scalar_t* gradient, int64_t size, Real upstream) {
  using T = Accumulate<scalar_t>;
  __shared__ T factor;  // read once for each block: a read by each thread would take 30 us
  if (threadIdx.x == 0) factor = read_number<T>(upstream);
  __syncthreads();
  if (factor == 1) return;  // the usual case: loss.backward() with nothing after the loss
  constexpr int kVector = 16 / sizeof(scalar_t);
  auto* vectors = reinterpret_cast<Packed<scalar_t, kVector>*>(gradient);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < size / kVector; i += threads) {
    auto packed = vectors[i];
#pragma unroll
    for (scalar_t& value : packed.value)
      value = static_cast<scalar_t>(factor * static_cast<T>(value));
    vectors[i] = packed;
  }
  for (int64_t i = size / kVector * kVector + thread; i < size; i += threads) {
    gradient[i] = static_cast<scalar_t>(factor * static_cast<T>(gradient[i]));
  }
}

}  // namespace

template <typename scalar_t>
void launch_loss(const Problem<scalar_t>& p, int processors, cudaStream_t stream) {
  constexpr int kVector = sizeof(scalar_t) == 8 ? 1 : 16 / sizeof(scalar_t);
  const bool vectors =
      p.classes % kVector == 0 && is_aligned(p.logits) && is_aligned(p.teacher_logits);
  if (p.kept && p.mean) {
    count_kernel<<<1, 1024, 0, stream>>>(p.labels, p.rows, p.ignore_index, p.kept);
  }
  if (p.teacher_logits) {
    vectors ? choose<kVector, true>(p, processors, stream) : choose<1, true>(p, processors, stream);
  } else {
    vectors ? choose<kVector, false>(p, processors, stream)
            : choose<1, false>(p, processors, stream);
  }
}

template <typename scalar_t>
void launch_scale(scalar_t* gradient, int64_t size, Real upstream, cudaStream_t stream) {
  const int64_t wanted = (size + kScaleThreads - 1) / kScaleThreads;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(wanted, kScaleBlocks));
  scale_kernel<<<blocks, kScaleThreads, 0, stream>>>(gradient, size, upstream);
}

template void launch_scale(double*, int64_t, Real, cudaStream_t);
template void launch_scale(float*, int64_t, Real, cudaStream_t);
template void launch_scale(c10::BFloat16*, int64_t, Real, cudaStream_t);
template void launch_loss(const Problem<double>&, int, cudaStream_t);
template void launch_loss(const Problem<float>&, int, cudaStream_t);
template void launch_loss(const Problem<c10::Half>&, int, cudaStream_t);
template void launch_loss(const Problem<c10::BFloat16>&, int, cudaStream_t);

}  // namespace taylorglo
