// The mathematics of the TaylorGLO loss, for taylorglo.cpp on the CPU and taylorglo.cu on the GPU.
//
// In Eq. 2, x is the LABEL (one-hot, or distilled by Eq. 3) and y is the PREDICTION (the softmax of
// the logits z); this is the reverse of the usual habit. n is the number of classes:
//
//   L = -1/n sum_i f(x_i, y_i)                                 Eq. 2, f is the bracket
//   dL/dz_j = -1/n y_j (G_j - sum_i G_i y_i),  G_i = df/dy_i   the chain rule through the softmax
//
// f is a polynomial. Multiplied out, with a = y - t1, b = x - t0 and Eq. 2's factorials, it reads
//
//   f     = f0 + f1 x + f2 x^2 + (a0 + a1 x + a2 x^2) y + (b0 + b1 x) y^2 / 2 + c y^3 / 3
//   df/dy = a0 + a1 x + a2 x^2 + (b0 + b1 x) y + c y^2
//
// So the sums of f and of y df/dy over the classes are sums of products of x and y: the moments.
// The pass that finds the softmax computes them from e = exp(z - max z) and, with a teacher,
// h = exp(teacher - max teacher). Then y = e / sum e and, for a class that is not the label,
// x = alpha h / sum h (0 without a teacher). a0 is in every G_j and, because sum y = 1, also in
// sum_i G_i y_i. It cancels, so both leave it out. All classes are first treated as if none were
// the label. The label's class has an x that is larger by d = 1 - alpha, which adds to f and df/dy
//
//   d (f1 + f2 u + (a1 + a2 u) y + b1 y^2 / 2)  and  d (a1 + a2 u + b1 y)   with u = 2 x + d.
#pragma once

#if defined(__CUDACC__)
#define TAYLORGLO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TAYLORGLO_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace taylorglo {

template <typename S>
struct Polynomial {
  S f0, f1, f2, a0, a1, a2, b0, b1, c;

  Polynomial() = default;
  template <typename Source>
  TAYLORGLO_HOST_DEVICE explicit Polynomial(const Source* t) {
    const S t0 = S(t[0]), t1 = S(t[1]), t4 = S(t[4]), t5 = S(t[5]), t6 = S(t[6]), t7 = S(t[7]);
    const S p2 = t7 * S(0.5), c2 = t4 * S(0.5);
    // p = t2 + t5 b + t7 b^2 / 2 and q = t3 + t6 b, in powers of x; f = p a + q a^2 / 2 + t4 a^3
    // / 6.
    const S p0 = S(t[2]) - t0 * (t5 - t0 * p2), p1 = t5 - t0 * t7;
    const S q0 = S(t[3]) - t0 * t6;
    f0 = t1 * (t1 * (q0 * S(0.5) - t1 * t4 * S(1.0 / 6)) - p0);
    f1 = t1 * (t1 * t6 * S(0.5) - p1);
    f2 = -t1 * p2;
    a0 = p0 - t1 * (q0 - t1 * c2);
    a1 = p1 - t1 * t6;
    a2 = p2;
    b0 = q0 - t1 * t4;
    b1 = t6;
    c = c2;
  }
};

// The moments of one row, or of several rows if V is a vector of S.
template <typename V, bool kTeacher>
struct Moments {
  static constexpr int kCount = kTeacher ? 8 : 3;
  enum { kE, kEE, kEEE, kH, kHH, kEH, kEHH, kEEH };
  V sum[kCount] = {};

  TAYLORGLO_HOST_DEVICE void add(V e, V h) {
    const V ee = e * e;
    sum[kE] += e;
    sum[kEE] += ee;
    sum[kEEE] += ee * e;
    if constexpr (kTeacher) {
      const V eh = e * h;
      sum[kH] += h;
      sum[kHH] += h * h;
      sum[kEH] += eh;
      sum[kEHH] += eh * h;
      sum[kEEH] += eh * e;
    }
  }

  // Turn sums over e and h into sums over e times `e` and h times `h`.
  TAYLORGLO_HOST_DEVICE void scale(V e, V h) {
    sum[kE] *= e;
    sum[kEE] *= e * e;
    sum[kEEE] *= e * e * e;
    if constexpr (kTeacher) {
      sum[kH] *= h;
      sum[kHH] *= h * h;
      sum[kEH] *= e * h;
      sum[kEHH] *= e * h * h;
      sum[kEEH] *= e * e * h;
    }
  }
};

// The loss of a row, and the numbers for its gradient.
template <typename S, typename V, bool kTeacher>
struct Row {
  V f, dot;            // sum_i f_i; sum_i G_i y_i without a0
  V label_y, label_x;  // y of the label's class, and its x as if it were not the label
  V label_df;          // what the label adds to the G of its class

  // e_label, h_label: of the label's class. y_factor: 1 / sum e. x_factor: alpha / sum h.
  TAYLORGLO_HOST_DEVICE Row(const Polynomial<S>& p, Moments<V, kTeacher> m, S n, S alpha,
                            V y_factor, V x_factor, V e_label, V h_label) {
    using M = Moments<V, kTeacher>;
    m.scale(y_factor, x_factor);
    const V square = p.b0 * m.sum[M::kEE], cube = p.c * m.sum[M::kEEE];
    V linear = {}, mixed = {}, constant = {};
    if constexpr (kTeacher) {
      constant = p.f1 * alpha + p.f2 * m.sum[M::kHH];
      linear = p.a1 * m.sum[M::kEH] + p.a2 * m.sum[M::kEHH];
      mixed = p.b1 * m.sum[M::kEEH];
    }
    const S d = 1 - alpha;
    label_y = e_label * y_factor;
    label_x = kTeacher ? h_label * x_factor : V{};
    const V u = label_x + label_x + d, a = p.a1 + p.a2 * u, by = p.b1 * label_y;
    label_df = d * (a + by);
    dot = linear + mixed + square + cube + label_y * label_df;
    f = constant + linear + (mixed + square) * S(0.5) + cube * S(1.0 / 3) +
        d * (p.f1 + p.f2 * u + (a + by * S(0.5)) * label_y) + (n * p.f0 + p.a0);
  }
};

// dL/dz as a polynomial in e and h, with every factor folded into its coefficients.
template <typename S, typename V, bool kTeacher>
struct Slope {
  V k, h1, h2, e1, e1h1, e2;

  TAYLORGLO_HOST_DEVICE Slope(const Polynomial<S>& p, V dot, V scale, V y_factor, V x_factor) {
    const V y = y_factor * scale;
    k = -dot * y;
    e1 = p.b0 * y_factor * y;
    e2 = p.c * y_factor * y_factor * y;
    if constexpr (kTeacher) {
      h1 = p.a1 * x_factor * y;
      h2 = p.a2 * x_factor * x_factor * y;
      e1h1 = p.b1 * x_factor * y_factor * y;
    }
  }

  TAYLORGLO_HOST_DEVICE V operator()(V e, V h) const {
    if constexpr (kTeacher) return e * (k + h * (h1 + h * h2) + e * (e1 + h * e1h1 + e * e2));
    return e * (k + e * (e1 + e * e2));
  }
};

}  // namespace taylorglo
