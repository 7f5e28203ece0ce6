// The operator's schema, its autograd and fake registrations, and the CPU kernel. The formula itself is in taylorglo.h.
//
// The forward computes the loss and, if it will be needed, the gradient in one pass over the logits; the backward only
// scales that gradient.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <vector>

#include "inputs.h"
#include "taylorglo.h"

namespace taylorglo {

// ---- Vectors of 64 bytes; the compiler maps them to whatever registers the processor has -----------------------------

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64)));
  typedef int32_t bits __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <typename T>
constexpr int kLanes = 64 / sizeof(T);

// exp(v) for v <= 0, to about one unit in the last place; 0 where exp(v) is no normal number, NaN for NaN.
inline Vector<float>::type exp_nonpositive(Vector<float>::type v) {
  using F = Vector<float>::type;
  using I = Vector<float>::bits;
  const float round = 12582912.f;               // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F shifted = v * 1.44269504f + round;    // n = round(v / ln 2)
  const F n = shifted - round;
  const F r = (v - n * 0.693359375f) + n * 2.12194440e-4f;  // v - n ln 2, in two steps: |r| <= ln(2) / 2
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;            // the minimax polynomial of Cephes' expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  I exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent - 0x4b400000 + 127) << 23;  // 0x4b400000 are the bits of `round`
  F power;                                         // 2^n
  std::memcpy(&power, &exponent, sizeof(power));
  return v < -87.33f ? F{} : p * power;
}

inline Vector<double>::type exp_nonpositive(Vector<double>::type v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::exp(v[i]);
  return v;
}

// ---- Tiles: a few rows of logits, laid out so that every step below is a loop over whole vectors ----------------------

// Many classes: a tile is one row, and neighbouring lanes hold neighbouring classes. Unused lanes are at the row's end.
template <typename T>
struct Wide {
  using V = typename Vector<T>::type;
  static constexpr int64_t kRows = 1;
  static int64_t vectors(int64_t classes) { return (classes + kLanes<T> - 1) / kLanes<T>; }
  static int64_t full_vectors(int64_t, int64_t classes) { return classes / kLanes<T>; }
  static int64_t index(int64_t, int64_t c) { return c; }
  static int lane(int64_t) { return 0; }
  static V sum(V v) {
    T total = 0;
    for (int i = 0; i < kLanes<T>; ++i) total += v[i];
    return V{} + total;
  }
  static V max(V v) {
    T best = v[0];
    for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
    return V{} + best;
  }
};

// Few classes: a tile is as many rows as a vector has lanes, one row a lane. In the last tile, lanes may be unused.
template <typename T>
struct Tall {
  using V = typename Vector<T>::type;
  static constexpr int64_t kRows = kLanes<T>;
  static int64_t vectors(int64_t classes) { return classes; }
  static int64_t full_vectors(int64_t rows, int64_t classes) { return rows == kRows ? classes : 0; }
  static int64_t index(int64_t r, int64_t c) { return c * kLanes<T> + r; }
  static int lane(int64_t r) { return static_cast<int>(r); }
  static V sum(V v) { return v; }
  static V max(V v) { return v; }
};

// Unused lanes become -inf, so that their softmax is 0.
template <typename Layout, typename T, typename scalar_t>
void load(typename Layout::V* tile, const scalar_t* source, int64_t rows, int64_t classes) {
  const T infinity = std::numeric_limits<T>::infinity();
  for (int64_t i = Layout::full_vectors(rows, classes); i < Layout::vectors(classes); ++i) {
    tile[i] = typename Layout::V{} - infinity;
  }
  T* lanes = reinterpret_cast<T*>(tile);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < classes; ++c) lanes[Layout::index(r, c)] = static_cast<T>(source[r * classes + c]);
  }
}

template <typename Layout, typename T, typename scalar_t>
void store(scalar_t* target, const typename Layout::V* tile, int64_t rows, int64_t classes) {
  const T* lanes = reinterpret_cast<const T*>(tile);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < classes; ++c) target[r * classes + c] = static_cast<scalar_t>(lanes[Layout::index(r, c)]);
  }
}

// The softmax of a tile in place, times `factor`. A NaN or +inf logit makes its whole row NaN.
template <typename Layout, typename T>
void softmax(typename Layout::V* tile, int64_t vectors, T factor) {
  using V = typename Layout::V;
  V max = tile[0], sum = {};
  for (int64_t i = 1; i < vectors; ++i) max = tile[i] > max ? tile[i] : max;
  max = Layout::max(max);
  for (int64_t i = 0; i < vectors; ++i) {
    tile[i] = exp_nonpositive(tile[i] - max);
    sum += tile[i];
  }
  const V scale = factor / Layout::sum(sum);
  for (int64_t i = 0; i < vectors; ++i) tile[i] *= scale;
}

// ---- The CPU kernel --------------------------------------------------------------------------------------------------

template <typename scalar_t, typename T>
struct Problem {
  const scalar_t* logits;
  const scalar_t* teacher_logits;  // or nullptr
  const int64_t* labels;
  scalar_t* gradient;  // or nullptr
  int64_t rows, classes;
  Theta<T> theta;
  T alpha;
};

// The labels x of a tile: one-hot, or with a teacher Eq. 3.
template <typename Layout, typename scalar_t, typename T>
void load_labels(const Problem<scalar_t, T>& p, typename Layout::V* x, int64_t first, int64_t rows) {
  const int64_t vectors = Layout::vectors(p.classes);
  if (p.teacher_logits) {
    load<Layout, T>(x, p.teacher_logits + first * p.classes, rows, p.classes);
    softmax<Layout, T>(x, vectors, p.alpha);
  } else {
    for (int64_t i = 0; i < vectors; ++i) x[i] = typename Layout::V{};
  }
  T* lanes = reinterpret_cast<T*>(x);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t label = p.labels[first + r];
    TORCH_CHECK_VALUE(label >= 0 && label < p.classes, "labels: expected in [0, ", p.classes, "), got ", label,
                      " in row ", first + r);
    lanes[Layout::index(r, label)] += 1 - p.alpha;  // Eq. 3; alpha is 0 without a teacher
  }
}

// The sum of f over one tile; writes the tile's gradient if there is one.
template <typename Layout, typename scalar_t, typename T>
double tile_sum(const Problem<scalar_t, T>& p, typename Layout::V* x, typename Layout::V* y, int64_t first,
                int64_t rows) {
  using V = typename Layout::V;
  const int64_t vectors = Layout::vectors(p.classes);
  load_labels<Layout>(p, x, first, rows);
  load<Layout, T>(y, p.logits + first * p.classes, rows, p.classes);
  softmax<Layout, T>(y, vectors, T(1));
  V sum = {}, dot = {};
  for (int64_t i = 0; i < vectors; ++i) {
    const Cubic<T, V> cubic(p.theta, x[i]);
    sum += cubic.f(y[i]);      // Eq. 2
    x[i] = cubic.df_dy(y[i]);  // G, in the place of x
    dot += x[i] * y[i];        // sum_i G_i y_i
  }
  if (p.gradient) {
    const T scale = T(-1.0 / (double(p.rows) * double(p.classes)));  // Eq. 2's -1/n, and the mean over the batch
    dot = Layout::sum(dot);
    for (int64_t i = 0; i < vectors; ++i) y[i] *= scale * (x[i] - dot);
    store<Layout, T>(p.gradient + first * p.classes, y, rows, p.classes);
  }
  sum = Layout::sum(sum);
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) total += sum[Layout::lane(r)];
  // The unused lanes of a wide tile added f(0, 0) each; those of a tall tile were not read.
  const int64_t unused = Layout::kRows == 1 ? vectors * kLanes<T> - p.classes : 0;
  return unused ? total - unused * double(Cubic<T, T>(p.theta, 0).f(0)) : total;
}

// The sum of f over all rows. Rows are summed in chunks of fixed size and the chunks in order, so that the result does
// not depend on the number of threads.
template <typename Layout, typename scalar_t, typename T>
double batch_sum(const Problem<scalar_t, T>& p) {
  using V = typename Layout::V;
  constexpr int64_t kChunkRows = 64, kGrainElements = 16384;
  const int64_t chunks = (p.rows + kChunkRows - 1) / kChunkRows;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kChunkRows * p.classes));
  std::vector<double> partial(chunks);
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    struct alignas(V) Storage { char bytes[sizeof(V)]; };
    const int64_t vectors = Layout::vectors(p.classes);
    std::unique_ptr<Storage[]> scratch(new Storage[2 * vectors]);
    V* x = reinterpret_cast<V*>(scratch.get());
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(p.rows, (chunk + 1) * kChunkRows);
      for (int64_t row = chunk * kChunkRows; row < last; row += Layout::kRows) {
        partial[chunk] += tile_sum<Layout>(p, x, x + vectors, row, std::min(Layout::kRows, last - row));
      }
    }
  });
  double total = 0;
  for (double sum : partial) total += sum;
  return total;
}

double read_number(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? *tensor.const_data_ptr<double>() : *tensor.const_data_ptr<float>();
}

template <typename T>
Theta<T> read_theta(const Tensor& theta) {
  const Tensor t = theta.contiguous();
  if (t.scalar_type() == at::kDouble) return load_theta<T>(t.const_data_ptr<double>());
  return load_theta<T>(t.const_data_ptr<float>());
}

// Returns the loss; fills `gradient` if it is defined.
Tensor loss_on_cpu(const Tensor& logits, const Tensor& labels, const Tensor& theta, const MaybeTensor& teacher_logits,
                   const MaybeTensor& alpha, std::optional<double> alpha_number, const Tensor& gradient) {
  const Tensor z = logits.contiguous(), l = labels.contiguous();
  const Tensor teacher = teacher_logits ? teacher_logits->contiguous() : Tensor();
  const double a = alpha ? read_number(*alpha) : alpha_number.value_or(0);
  Tensor loss = at::empty({}, z.options().dtype(accumulate_type(z)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, z.scalar_type(), "taylorglo_loss", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const Problem<scalar_t, T> problem{
        z.const_data_ptr<scalar_t>(),
        teacher.defined() ? teacher.const_data_ptr<scalar_t>() : nullptr,
        l.const_data_ptr<int64_t>(),
        gradient.defined() ? gradient.mutable_data_ptr<scalar_t>() : nullptr,
        z.size(0), z.size(1), read_theta<T>(theta), static_cast<T>(a)};
    constexpr int64_t kMostTallClasses = 64;
    const double sum = z.size(1) <= kMostTallClasses ? batch_sum<Tall<T>>(problem) : batch_sum<Wide<T>>(problem);
    *loss.mutable_data_ptr<T>() = static_cast<T>(-sum / (double(z.size(0)) * double(z.size(1))));
  });
  return loss;
}

// A fresh gradient of many megabytes costs more in page faults than in arithmetic, so ask for large pages.
Tensor empty_gradient(const Tensor& logits) {
  Tensor gradient = at::empty_like(logits, at::MemoryFormat::Contiguous);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20, kLeastBytes = 8 << 20;
  if (gradient.nbytes() >= kLeastBytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr());
    const uintptr_t first_page = (begin + kLargePage - 1) / kLargePage * kLargePage;
    madvise(reinterpret_cast<void*>(first_page), begin + gradient.nbytes() - first_page, MADV_HUGEPAGE);
  }
#endif
  return gradient;
}

Tensor loss_cpu(const Tensor& logits, const Tensor& labels, const Tensor& theta, const MaybeTensor& teacher_logits,
                const MaybeTensor& alpha, std::optional<double> alpha_number) {
  check_inputs(logits, labels, theta, teacher_logits, alpha, alpha_number);
  return loss_on_cpu(logits, labels, theta, teacher_logits, alpha, alpha_number, Tensor());
}

std::tuple<Tensor, Tensor> loss_and_gradient_cpu(const Tensor& logits, const Tensor& labels, const Tensor& theta,
                                                 const MaybeTensor& teacher_logits, const MaybeTensor& alpha,
                                                 std::optional<double> alpha_number) {
  check_inputs(logits, labels, theta, teacher_logits, alpha, alpha_number);
  const Tensor gradient = empty_gradient(logits);
  return {loss_on_cpu(logits, labels, theta, teacher_logits, alpha, alpha_number, gradient), gradient};
}

void scale_gradient_cpu(const Tensor& gradient, const Tensor& upstream) {
  if (read_number(upstream) != 1) gradient.mul_(upstream);
}

// ---- Shapes and dtypes alone, for tracing ----------------------------------------------------------------------------

Tensor loss_meta(const Tensor& logits, const Tensor& labels, const Tensor& theta, const MaybeTensor& teacher_logits,
                 const MaybeTensor& alpha, std::optional<double> alpha_number) {
  check_inputs(logits, labels, theta, teacher_logits, alpha, alpha_number);
  return at::empty({}, logits.options().dtype(accumulate_type(logits)));
}

std::tuple<Tensor, Tensor> loss_and_gradient_meta(const Tensor& logits, const Tensor& labels, const Tensor& theta,
                                                  const MaybeTensor& teacher_logits, const MaybeTensor& alpha,
                                                  std::optional<double> alpha_number) {
  return {loss_meta(logits, labels, theta, teacher_logits, alpha, alpha_number),
          at::empty_symint(logits.sym_sizes(), logits.options())};
}

// ---- Autograd --------------------------------------------------------------------------------------------------------

template <typename Signature>
const c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The saved gradient times the gradient of the loss. Without retain_graph nobody will read the saved one again, so it is
// scaled in place, which is no work at all in the usual case of a factor 1.
Tensor scale_gradient(const Tensor& gradient, const Tensor& upstream) {
  static const auto scale_in_place = find_operator<decltype(scale_gradient_cpu)>("taylorglo::scale_gradient_");
  const bool is_traced = gradient.key_set().has_any(c10::python_ks) || upstream.key_set().has_any(c10::python_ks);
  if (is_traced || torch::autograd::get_current_graph_task_keep_graph()) return at::mul(gradient, upstream);
  scale_in_place.call(gradient, upstream);
  return gradient;
}

// A plain Node, as PyTorch's own operators have: torch::autograd::Function costs about 5 us more, a sixth of the whole step
// for 128 rows of 10 classes.
struct TaylorGLOLossBackward : torch::autograd::Node {
  torch::autograd::SavedVariable gradient;

  torch::autograd::variable_list apply(torch::autograd::variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "taylorglo_loss is differentiable only once, so create_graph=True and torch.func.grad are not supported; "
                "after taylorglo_ext.load('reference') they are");
    if (!upstream[0].defined()) return {Tensor()};
    return {scale_gradient(gradient.unpack(), upstream[0])};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradient.reset_data();
  }
};

Tensor loss_autograd(const Tensor& logits, const Tensor& labels, const Tensor& theta,
                     const MaybeTensor& teacher_logits, const MaybeTensor& alpha, std::optional<double> alpha_number) {
  TORCH_CHECK_NOT_IMPLEMENTED(!logits._fw_grad(/*level=*/0).defined(),
                              "taylorglo_loss has no forward-mode derivative; after taylorglo_ext.load('reference') it has");
  static const auto forward = find_operator<decltype(loss_cpu)>("taylorglo::loss");
  static const auto forward_with_gradient = find_operator<decltype(loss_and_gradient_cpu)>("taylorglo::loss_and_gradient");
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward.call(logits, labels, theta, teacher_logits, alpha, alpha_number);
  }
  std::shared_ptr<TaylorGLOLossBackward> node(new TaylorGLOLossBackward(), torch::autograd::deleteNode);
  node->set_next_edges(torch::autograd::collect_next_edges(logits));
  Tensor loss, gradient;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(loss, gradient) = forward_with_gradient.call(logits, labels, theta, teacher_logits, alpha, alpha_number);
  }
  node->gradient = torch::autograd::SavedVariable(std::move(gradient), /*is_output=*/false);
  torch::autograd::create_gradient_edge(loss, node);
  return loss;
}

// As every loss under autocast, this one computes in float32: a gradient saved in float16 would have lost its small numbers
// before the upstream gradient, which loss scaling makes large, could lift them.
Tensor loss_autocast(const Tensor& logits, const Tensor& labels, const Tensor& theta,
                     const MaybeTensor& teacher_logits, const MaybeTensor& alpha, std::optional<double> alpha_number) {
  static const auto op = find_operator<decltype(loss_cpu)>("taylorglo::loss");
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
  const auto widen = [](const Tensor& tensor) {
    const bool is_half = tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
    return is_half ? tensor.to(at::kFloat) : tensor;
  };
  const MaybeTensor teacher = teacher_logits ? MaybeTensor(widen(*teacher_logits)) : std::nullopt;
  return op.call(widen(logits), labels, theta, teacher, alpha, alpha_number);
}

#define TAYLORGLO_ARGUMENTS \
  "(Tensor logits, Tensor labels, Tensor theta, Tensor? teacher_logits, Tensor? alpha, float? alpha_number)"

TORCH_LIBRARY(taylorglo, m) {
  m.def("loss" TAYLORGLO_ARGUMENTS " -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("loss_and_gradient" TAYLORGLO_ARGUMENTS " -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor upstream) -> ()", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(taylorglo, CPU, m) {
  m.impl("loss", &loss_cpu);
  m.impl("loss_and_gradient", &loss_and_gradient_cpu);
  m.impl("scale_gradient_", &scale_gradient_cpu);
}

TORCH_LIBRARY_IMPL(taylorglo, Meta, m) {
  m.impl("loss", &loss_meta);
  m.impl("loss_and_gradient", &loss_and_gradient_meta);
}

TORCH_LIBRARY_IMPL(taylorglo, Autograd, m) { m.impl("loss", &loss_autograd); }
TORCH_LIBRARY_IMPL(taylorglo, AutocastCPU, m) { m.impl("loss", &loss_autocast); }
TORCH_LIBRARY_IMPL(taylorglo, AutocastCUDA, m) { m.impl("loss", &loss_autocast); }

}  // namespace taylorglo
