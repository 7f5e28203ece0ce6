// Vectors of up to 16 bytes: one instruction reads or writes one.
#pragma once

#include <c10/util/BFloat16.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <type_traits>

namespace taylorglo {

template <typename scalar_t, int kVector>
struct alignas(std::min<int>(sizeof(scalar_t) * kVector, 16)) Packed {
  scalar_t value[kVector];
};

template <typename scalar_t, int kVector, typename T>
__device__ __forceinline__ void round_vector(const T (&numbers)[kVector],
                                             Packed<scalar_t, kVector>& packed) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16> && kVector > 1) {  // two in one instruction
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
    for (int k = 0; k < kVector; k += 2)
      pairs[k / 2] = __floats2bfloat162_rn(numbers[k], numbers[k + 1]);
  } else
#endif
  {
#pragma unroll
    for (int k = 0; k < kVector; ++k) packed.value[k] = static_cast<scalar_t>(numbers[k]);
  }
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffff, v, mask);
}

}  // namespace taylorglo
