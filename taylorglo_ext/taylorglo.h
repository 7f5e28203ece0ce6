// The mathematics of the TaylorGLO loss, once, for the host and the device. taylorglo.cpp and taylorglo.cu include it.
//
// In Eq. 2, x is the LABEL (one-hot, or distilled by Eq. 3) and y is the PREDICTION (the softmax of the logits); this is
// the reverse of the usual habit. n is the number of classes, z are the logits:
//
//   L = -1/n sum_i f(x_i, y_i)                                      Eq. 2, f is the bracket
//   dL/dz_j = -1/n y_j (G_j - sum_i G_i y_i),  G_i = df/dy_i        the chain rule through the softmax
#pragma once

#if defined(__CUDACC__)
#define TAYLORGLO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TAYLORGLO_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace taylorglo {

// S is the type of a parameter; V is S itself, or a vector of S.
template <typename S>
struct Theta {
  S t0, t1, t2, t3, t4, t5, t6, t7;
};

template <typename S, typename Source>
TAYLORGLO_HOST_DEVICE Theta<S> load_theta(const Source* t) {
  return {S(t[0]), S(t[1]), S(t[2]), S(t[3]), S(t[4]), S(t[5]), S(t[6]), S(t[7])};
}

// For one class with label x, Eq. 2's bracket is a cubic polynomial in its prediction y. With a = y - t1 and b = x - t0:
template <typename S, typename V>
struct Cubic {
  V p, q;
  S t1, t4;

  Cubic() = default;
  TAYLORGLO_HOST_DEVICE Cubic(const Theta<S>& t, V x) : t1(t.t1), t4(t.t4) {
    const V b = x - t.t0;
    p = t.t2 + b * (t.t5 + b * (t.t7 * S(0.5)));  // p = t2 + t5 b + t7 b^2 / 2
    q = t.t3 + b * t.t6;                          // q = t3 + t6 b
  }

  TAYLORGLO_HOST_DEVICE V f(V y) const {
    const V a = y - t1;
    return a * (p + a * (q * S(0.5) + a * (t4 * S(1.0 / 6))));  // f = p a + q a^2 / 2 + t4 a^3 / 6
  }

  TAYLORGLO_HOST_DEVICE V df_dy(V y) const {
    const V a = y - t1;
    return p + a * (q + a * (t4 * S(0.5)));  // df/dy = p + q a + t4 a^2 / 2
  }
};

}  // namespace taylorglo
