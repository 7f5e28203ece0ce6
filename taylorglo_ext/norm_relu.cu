// relu(batch normalisation + an optional shortcut) in training, for channels last: two kernels
// forward and two backward. A row is the channels of one pixel. In the first kernel each block sums
// over its own rows and writes the sums as a record. In the second each block adds up the records,
// always in the same order, and writes the result. Without atomics the bits are the same each time.
//
// Variances come from means and squared distances from them, which are merged as by Chan, Golub and
// LeVeque (1979): E[x^2] - E[x]^2 would lose all digits where the mean is large.
#include <c10/util/Half.h>

#include <cmath>
#include <type_traits>

#include "norm_relu.h"
#include "packed.h"

namespace taylorglo {
namespace {

constexpr int kThreads = Layout::kThreads, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kMomentRows = 8, kRows = 4;  // rows whose numbers a thread holds at once

template <typename scalar_t>
constexpr int kVector = 16 / sizeof(scalar_t);
template <typename scalar_t>
constexpr int kSlice = kVector<scalar_t> * Layout::kMostLanes;  // channels of a block, at most
template <typename scalar_t>
using Vector = Packed<scalar_t, kVector<scalar_t>>;

// The largest number that rounds to 0 in scalar_t. ReLU of it is not positive.
template <typename scalar_t>
constexpr float kZero = std::is_same_v<scalar_t, c10::Half> ? 1.f / (1 << 25) : 0.f;

// ---- A thread's way through the rows ------------------------------------------------------------

template <typename scalar_t>
struct Walk {
  int lane, channel;  // which vector of the slice, and its first channel
  bool inside;        // false for a lane without a vector, in the last slice
  int64_t at, step;   // the place of the next vector, and the distance to the one after
  int left;           // rows

  template <typename Problem>
  __device__ __forceinline__ explicit Walk(const Problem& p) {
    const int lanes = p.layout.lanes, block_rows = kThreads / lanes;
    lane = threadIdx.x % lanes;
    channel = (blockIdx.y * lanes + lane) * kVector<scalar_t>;
    inside = channel < p.channels;
    const unsigned row = blockIdx.x * block_rows + threadIdx.x / lanes;
    const unsigned rows = gridDim.x * block_rows;
    left = inside && row < p.rows ? static_cast<int>((p.rows - row - 1) / rows) + 1 : 0;
    at = int64_t(row) * p.channels + channel;
    step = int64_t(rows) * p.channels;
  }

  template <int kCount>
  __device__ __forceinline__ void next() {
    at += kCount * step;
    left -= kCount;
  }

  // Read the vectors of the next rows; zeros where no rows are left.
  template <int kCount>
  __device__ __forceinline__ void read(const scalar_t* data,
                                       Vector<scalar_t> (&vectors)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      vectors[i] = {};
      if (i < left) vectors[i] = *reinterpret_cast<const Vector<scalar_t>*>(data + at + i * step);
    }
  }

  __device__ __forceinline__ void write(scalar_t* data, int i, Vector<scalar_t> vector) const {
    *reinterpret_cast<Vector<scalar_t>*>(data + at + i * step) = vector;
  }
};

template <int kCount>
__device__ __forceinline__ void read_channels(const float* data, float (&numbers)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) numbers[k] = data[k];
}

// ---- Shares of the rows, and how two are joined -------------------------------------------------

// The share of `rows` rows in the sums of a channel. With kMoments, a is the mean and b the sum of
// squared distances from it; without, both are sums.
struct Share {
  float a, b, rows;
};

// The factors for joining `more` rows to `rows`.
struct Weight {
  float part, scale;
  __device__ __forceinline__ Weight(float rows, float more) {
    part = rows > 0 ? __fdividef(more, rows + more) : 1.f;
    scale = rows * part;
  }
};

template <bool kMoments>
__device__ __forceinline__ void join(float& a, float& b, float more_a, float more_b, Weight w) {
  if constexpr (kMoments) {
    const float distance = more_a - a;
    a = fmaf(distance, w.part, a);
    b += fmaf(distance * w.scale, distance, more_b);
  } else {
    a += more_a;
    b += more_b;
  }
}

// Joins the first kCount channels of two lanes that are `mask` apart. Each lane keeps one half: the
// lane whose bit is set keeps the second.
template <bool kMoments, int kCount, int kChannels>
__device__ __forceinline__ void join_halves(float (&a)[kChannels], float (&b)[kChannels],
                                            float& rows, int mask) {
  const bool second = threadIdx.x & mask;
  const float more = shuffle_xor(rows, mask);
  const Weight weight(rows, more);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int j = i + kCount / 2;
    const float more_a = shuffle_xor(second ? a[i] : a[j], mask);
    const float more_b = shuffle_xor(second ? b[i] : b[j], mask);
    if (second) {
      a[i] = a[j];
      b[i] = b[j];
    }
    join<kMoments>(a[i], b[i], more_a, more_b, weight);
  }
  rows += more;
}

// Joins the shares of the whole block. Afterwards thread t has the share of the slice's channel t.
// Every thread must call this. It overwrites a and b.
template <bool kMoments, int kChannels>
__device__ __forceinline__ Share join_block(float (&a)[kChannels], float (&b)[kChannels],
                                            float rows, int lanes) {
  __shared__ float of_warp_a[kWarps][kChannels * Layout::kMostLanes];
  __shared__ float of_warp_b[kWarps][kChannels * Layout::kMostLanes];
  __shared__ float of_warp_rows[kWarps][Layout::kMostLanes];
  constexpr int kKept = kChannels / 4;
  join_halves<kMoments, kChannels>(a, b, rows, 16);
  join_halves<kMoments, kChannels / 2>(a, b, rows, 8);
  for (int mask = 4; mask >= lanes; mask /= 2) {
    const float more = shuffle_xor(rows, mask);
    const Weight weight(rows, more);
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      join<kMoments>(a[i], b[i], shuffle_xor(a[i], mask), shuffle_xor(b[i], mask), weight);
    rows += more;
  }
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % lanes;
  if (thread % 8 < lanes) {
    const int first = lane * kChannels + (thread & 16 ? 2 * kKept : 0) + (thread & 8 ? kKept : 0);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      of_warp_a[warp][first + i] = a[i];
      of_warp_b[warp][first + i] = b[i];
    }
    if (thread % kWarp < lanes) of_warp_rows[warp][lane] = rows;
  }
  __syncthreads();
  Share share{};
  if (thread < lanes * kChannels) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float more = of_warp_rows[w][thread / kChannels];
      join<kMoments>(share.a, share.b, of_warp_a[w][thread], of_warp_b[w][thread],
                     Weight(share.rows, more));
      share.rows += more;
    }
  }
  return share;
}

// Writes the block's share for the second kernel.
template <bool kMoments, int kChannels>
__device__ __forceinline__ void leave(float (&a)[kChannels], float (&b)[kChannels], float rows,
                                      const Layout& layout, float* records) {
  const Share share = join_block<kMoments>(a, b, rows, layout.lanes);
  const int thread = threadIdx.x, channels = layout.lanes * kChannels;
  float* record = records + layout.record(kChannels, blockIdx.y, blockIdx.x);
  if (thread < channels) {
    record[thread] = share.a;
    record[channels + thread] = share.b;
  }
  if (thread == 0) record[2 * channels] = share.rows;
}

// Joins the shares of all blocks of the first kernel: thread t gets that of the slice's channel t.
template <bool kMoments, int kChannels>
__device__ __forceinline__ Share add_up(const Layout& layout, const float* records) {
  using Numbers = Packed<float, 4>;
  float a[kChannels] = {}, b[kChannels] = {}, rows = 0;
  const int lane = threadIdx.x % layout.lanes, channels = layout.lanes * kChannels;
#pragma unroll 2
  for (int block = threadIdx.x / layout.lanes; block < layout.found;
       block += kThreads / layout.lanes) {
    const float* record = records + layout.record(kChannels, blockIdx.y, block);
    const float more = record[2 * channels];
    const Weight weight(rows, more);
#pragma unroll
    for (int i = 0; i < kChannels; i += 4) {
      const auto more_a = *reinterpret_cast<const Numbers*>(record + lane * kChannels + i);
      const auto more_b =
          *reinterpret_cast<const Numbers*>(record + channels + lane * kChannels + i);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        join<kMoments>(a[i + k], b[i + k], more_a.value[k], more_b.value[k], weight);
    }
    rows += more;
  }
  return join_block<kMoments>(a, b, rows, layout.lanes);
}

// ---- Forward ------------------------------------------------------------------------------------

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2) find_moments(const NormRelu<scalar_t> p) {
  constexpr int kChannels = kVector<scalar_t>;
  float mean[kChannels] = {}, squares[kChannels] = {}, rows = 0;
  for (Walk<scalar_t> walk(p); walk.left > 0; walk.template next<kMomentRows>()) {
    Vector<scalar_t> x[kMomentRows];
    walk.read(p.x, x);
    const float more = walk.left < kMomentRows ? static_cast<float>(walk.left) : kMomentRows;
    const float share = 1 / more;
    const Weight weight(rows, more);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      float sum = 0, more_squares = 0;
#pragma unroll
      for (int i = 0; i < kMomentRows; ++i) sum += static_cast<float>(x[i].value[k]);
      const float more_mean = sum * share;
#pragma unroll
      for (int i = 0; i < kMomentRows; ++i) {
        const float distance = i < walk.left ? static_cast<float>(x[i].value[k]) - more_mean : 0.f;
        more_squares = fmaf(distance, distance, more_squares);
      }
      join<true>(mean[k], squares[k], more_mean, more_squares, weight);
    }
    rows += more;
  }
  leave<true>(mean, squares, rows, p.layout, p.records);
}

// The value before ReLU, without the shortcut. The backward computes the same bits again.
__device__ __forceinline__ float normalised(float x, float mean, float slope, float bias) {
  return fmaf(x - mean, slope, bias);
}

template <typename scalar_t, bool kShortcut>
__global__ void __launch_bounds__(kThreads, 2) fill_output(const NormRelu<scalar_t> p) {
  constexpr int kChannels = kVector<scalar_t>;
  __shared__ float means[kSlice<scalar_t>], slopes[kSlice<scalar_t>], biases[kSlice<scalar_t>];
  Walk<scalar_t> walk(p);
  Vector<scalar_t> x[kRows], shortcut[kRows];
  walk.read(p.x, x);  // they arrive while the records are added up
  if constexpr (kShortcut) walk.read(p.shortcut, shortcut);

  const Share share = add_up<true, kChannels>(p.layout, p.records);
  const int t = threadIdx.x, channels = p.layout.lanes * kChannels;
  const int c = blockIdx.y * channels + t;
  if (t < channels && c < p.channels) {
    const float mean = share.a, variance = share.b / static_cast<float>(p.rows);
    const float rstd = 1 / sqrtf(variance + p.eps);
    means[t] = mean;
    slopes[t] = rstd * p.weight[c];
    biases[t] = p.bias[c];
    if (blockIdx.x == 0) {
      const float old = 1 - p.momentum;
      p.running_mean[c] = fmaf(p.momentum, mean, old * p.running_mean[c]);
      p.running_var[c] = fmaf(p.momentum, variance * p.unbiased, old * p.running_var[c]);
      p.saved[c] = mean;
      p.saved[p.channels + c] = rstd;
    }
  }
  __syncthreads();
  if (!walk.inside) return;
  float mean[kChannels], slope[kChannels], bias[kChannels];
  read_channels(means + walk.lane * kChannels, mean);
  read_channels(slopes + walk.lane * kChannels, slope);
  read_channels(biases + walk.lane * kChannels, bias);
  while (walk.left > 0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float numbers[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        float z = normalised(static_cast<float>(x[i].value[k]), mean[k], slope[k], bias[k]);
        if constexpr (kShortcut) z += static_cast<float>(shortcut[i].value[k]);
        numbers[k] = z <= 0 ? 0 : z;  // NaN stays NaN
      }
      Vector<scalar_t> y;
      round_vector(numbers, y);
      if (i < walk.left) walk.write(p.y, i, y);
    }
    walk.template next<kRows>();
    walk.read(p.x, x);
    if constexpr (kShortcut) walk.read(p.shortcut, shortcut);
  }
}

// ---- Backward -----------------------------------------------------------------------------------

// Sums of dz, the gradient before ReLU, and of dz (x - mean). With a shortcut, dz is the shortcut's
// gradient; it is written here, so that the second kernel need not read y.
template <typename scalar_t, bool kShortcut>
__global__ void __launch_bounds__(kThreads, 2) find_sums(const NormReluBackward<scalar_t> p) {
  constexpr int kChannels = kVector<scalar_t>;
  float sum[kChannels] = {}, product[kChannels] = {};
  Walk<scalar_t> walk(p);
  if (walk.inside) {
    float mean[kChannels], slope[kChannels], bias[kChannels];
    read_channels(p.saved + walk.channel, mean);
    if constexpr (!kShortcut) {
      float weight[kChannels];
      read_channels(p.saved + p.channels + walk.channel, slope);
      read_channels(p.weight + walk.channel, weight);
      read_channels(p.bias + walk.channel, bias);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) slope[k] *= weight[k];
    }
    for (; walk.left > 0; walk.template next<kRows>()) {
      Vector<scalar_t> x[kRows], dz[kRows], y[kRows];
      walk.read(p.x, x);
      walk.read(p.dy, dz);
      if constexpr (kShortcut) walk.read(p.y, y);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          const float number = static_cast<float>(x[i].value[k]);
          bool blocked;  // not by NaN, as in PyTorch
          if constexpr (kShortcut) {
            blocked = static_cast<float>(y[i].value[k]) <= 0;
          } else {
            blocked = normalised(number, mean[k], slope[k], bias[k]) <= kZero<scalar_t>;
          }
          if (blocked || i >= walk.left) dz[i].value[k] = static_cast<scalar_t>(0.f);
          const float gradient = static_cast<float>(dz[i].value[k]);
          sum[k] += gradient;
          product[k] = fmaf(gradient, number - mean[k], product[k]);
        }
        if (kShortcut && i < walk.left) walk.write(p.dshortcut, i, dz[i]);
      }
    }
  }
  leave<false>(sum, product, 0, p.layout, p.records);
}

// dx = slope (dz - sum dz / rows - (x - mean) rstd^2 sum dz (x - mean) / rows)
template <typename scalar_t, bool kShortcut>
__global__ void __launch_bounds__(kThreads, 2) fill_gradient(const NormReluBackward<scalar_t> p) {
  constexpr int kChannels = kVector<scalar_t>;
  __shared__ float means[kSlice<scalar_t>], slopes[kSlice<scalar_t>], biases[kSlice<scalar_t>];
  __shared__ float constants[kSlice<scalar_t>], factors[kSlice<scalar_t>];
  Walk<scalar_t> walk(p);
  const scalar_t* gradient = kShortcut ? p.dshortcut : p.dy;
  Vector<scalar_t> x[kRows], dz[kRows];
  walk.read(p.x, x);
  walk.read(gradient, dz);

  const Share share = add_up<false, kChannels>(p.layout, p.records);
  const int t = threadIdx.x, channels = p.layout.lanes * kChannels;
  const int c = blockIdx.y * channels + t;
  if (t < channels && c < p.channels) {
    const float rows = static_cast<float>(p.rows), rstd = p.saved[p.channels + c];
    const float slope = rstd * p.weight[c], product = rstd * share.b;
    means[t] = p.saved[c];
    slopes[t] = slope;
    biases[t] = p.bias[c];
    constants[t] = -slope * (share.a / rows);
    factors[t] = -slope * (rstd * product / rows);
    if (blockIdx.x == 0) {
      p.dweight[c] = product;
      p.dbias[c] = share.a;
    }
  }
  __syncthreads();
  if (!walk.inside) return;
  float mean[kChannels], slope[kChannels], bias[kChannels], constant[kChannels], factor[kChannels];
  read_channels(means + walk.lane * kChannels, mean);
  read_channels(slopes + walk.lane * kChannels, slope);
  read_channels(biases + walk.lane * kChannels, bias);
  read_channels(constants + walk.lane * kChannels, constant);
  read_channels(factors + walk.lane * kChannels, factor);
  while (walk.left > 0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float numbers[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const float number = static_cast<float>(x[i].value[k]);
        float g = static_cast<float>(dz[i].value[k]);
        if constexpr (!kShortcut) {
          if (normalised(number, mean[k], slope[k], bias[k]) <= kZero<scalar_t>) g = 0;
        }
        numbers[k] = fmaf(slope[k], g, fmaf(number - mean[k], factor[k], constant[k]));
      }
      Vector<scalar_t> dx;
      round_vector(numbers, dx);
      if (i < walk.left) walk.write(p.dx, i, dx);
    }
    walk.template next<kRows>();
    walk.read(p.x, x);
    walk.read(gradient, dz);
  }
}

}  // namespace

template <typename scalar_t>
void launch(const NormRelu<scalar_t>& p, cudaStream_t stream) {
  const dim3 found(p.layout.found, p.layout.slices), filled(p.layout.filled, p.layout.slices);
  find_moments<scalar_t><<<found, kThreads, 0, stream>>>(p);
  if (p.shortcut) {
    fill_output<scalar_t, true><<<filled, kThreads, 0, stream>>>(p);
  } else {
    fill_output<scalar_t, false><<<filled, kThreads, 0, stream>>>(p);
  }
}

template <typename scalar_t>
void launch(const NormReluBackward<scalar_t>& p, cudaStream_t stream) {
  const dim3 found(p.layout.found, p.layout.slices), filled(p.layout.filled, p.layout.slices);
  if (p.y) {
    find_sums<scalar_t, true><<<found, kThreads, 0, stream>>>(p);
    fill_gradient<scalar_t, true><<<filled, kThreads, 0, stream>>>(p);
  } else {
    find_sums<scalar_t, false><<<found, kThreads, 0, stream>>>(p);
    fill_gradient<scalar_t, false><<<filled, kThreads, 0, stream>>>(p);
  }
}

template void launch(const NormRelu<float>&, cudaStream_t);
template void launch(const NormRelu<c10::Half>&, cudaStream_t);
template void launch(const NormRelu<c10::BFloat16>&, cudaStream_t);
template void launch(const NormReluBackward<float>&, cudaStream_t);
template void launch(const NormReluBackward<c10::Half>&, cudaStream_t);
template void launch(const NormReluBackward<c10::BFloat16>&, cudaStream_t);

}  // namespace taylorglo
