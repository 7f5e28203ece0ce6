// The operator's schema, its autograd and fake registrations, and the CPU kernel. The formula is in
// taylorglo.h.
//
// The forward computes the loss and, if needed, the gradient in one pass over the logits. The
// backward only scales that gradient.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
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
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "operator.h"
#include "taylorglo.h"

namespace taylorglo {
namespace {

// ---- Vectors of 64 bytes, which the compiler maps to the processor's registers ------------------

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

// exp(v) for v <= 0, to about one unit in the last place; 0 where it is below the normal numbers;
// NaN for NaN.
inline Vector<float>::type exp_nonpositive(Vector<float>::type v) {
  using F = Vector<float>::type;
  using I = Vector<float>::bits;
  const float round =
      12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F shifted = v * 1.44269504f + round;  // n = round(v / ln 2)
  const F n = shifted - round;
  const F r =
      (v - n * 0.693359375f) + n * 2.12194440e-4f;  // v - n ln 2, in two steps: |r| <= ln(2) / 2
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;    // the minimax polynomial of Cephes' expf
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

// ---- Tiles: a few rows of logits, laid out so that all loops are over whole vectors -------------

// Many classes: a tile is one row, and neighbouring lanes hold neighbouring classes. Unused lanes
// are at the row's end.
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
  static void set(V& v, int64_t, T value) { v = V{} + value; }
  static V max(V v) {
    T best = v[0];
    for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
    return V{} + best;
  }
};

// Few classes: each lane has one row. The last tile may have unused lanes.
template <typename T>
struct Tall {
  using V = typename Vector<T>::type;
  static constexpr int64_t kRows = kLanes<T>;
  static int64_t vectors(int64_t classes) { return classes; }
  static int64_t full_vectors(int64_t rows, int64_t classes) { return rows == kRows ? classes : 0; }
  static int64_t index(int64_t r, int64_t c) { return c * kLanes<T> + r; }
  static int lane(int64_t r) { return static_cast<int>(r); }
  static void set(V& v, int64_t r, T value) { v[r] = value; }
  static V sum(V v) { return v; }
  static V max(V v) { return v; }
};

// Unused lanes become -inf, whose softmax is 0.
template <typename Layout, typename T, typename scalar_t>
void load(typename Layout::V* tile, const scalar_t* source, int64_t rows, int64_t classes) {
  const T infinity = std::numeric_limits<T>::infinity();
  for (int64_t i = Layout::full_vectors(rows, classes); i < Layout::vectors(classes); ++i) {
    tile[i] = typename Layout::V{} - infinity;
  }
  T* lanes = reinterpret_cast<T*>(tile);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < classes; ++c)
      lanes[Layout::index(r, c)] = static_cast<T>(source[r * classes + c]);
  }
}

template <typename Layout, typename T, typename scalar_t>
void store(scalar_t* target, const typename Layout::V* tile, int64_t rows, int64_t classes) {
  const T* lanes = reinterpret_cast<const T*>(tile);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < classes; ++c)
      target[r * classes + c] = static_cast<scalar_t>(lanes[Layout::index(r, c)]);
  }
}

template <typename Layout>
typename Layout::V largest(const typename Layout::V* tile, int64_t vectors) {
  typename Layout::V max = tile[0];
  for (int64_t i = 1; i < vectors; ++i) max = tile[i] > max ? tile[i] : max;
  return Layout::max(max);
}

// ---- The CPU kernel -----------------------------------------------------------------------------

template <typename scalar_t, typename T, typename gradient_t>
struct Problem {
  const scalar_t* logits;
  const scalar_t* teacher_logits;  // or nullptr
  const int64_t* labels;
  gradient_t* gradient;  // or nullptr
  T* row_losses;         // or nullptr
  int64_t rows, classes;
  std::optional<int64_t> ignore_index;
  Polynomial<T> polynomial;
  T alpha, scale;  // scale: Eq. 2's -1/n, for the mean also divided by the number of rows
};

// Returns the sum of f over one tile, and writes the tile's gradient and the losses of its rows if
// asked to. e and h are memory for the exponentials of the logits and of the teacher's logits. A
// NaN or +inf logit makes its whole row NaN.
template <typename Layout, bool kTeacher, typename P, typename T>
double tile_sum(const P& p, const Polynomial<T>& polynomial, typename Layout::V* e,
                typename Layout::V* h, int64_t first, int64_t rows) {
  using V = typename Layout::V;
  const int64_t vectors = Layout::vectors(p.classes);
  load<Layout, T>(e, p.logits + first * p.classes, rows, p.classes);
  if (kTeacher) load<Layout, T>(h, p.teacher_logits + first * p.classes, rows, p.classes);
  const V max = largest<Layout>(e, vectors),
          teacher_max = kTeacher ? largest<Layout>(h, vectors) : V{};
  Moments<V, kTeacher> moments;
  for (int64_t i = 0; i < vectors; ++i) {
    e[i] = exp_nonpositive(e[i] - max);
    if (kTeacher) h[i] = exp_nonpositive(h[i] - teacher_max);
    moments.add(e[i], kTeacher ? h[i] : V{});
  }
  for (V& sum : moments.sum) sum = Layout::sum(sum);

  T* lanes = reinterpret_cast<T*>(e);
  const T* teacher_lanes = reinterpret_cast<const T*>(h);
  V e_label = {}, h_label = {}, scale = {};
  int64_t labels[Layout::kRows];  // -1: ignored
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t label = p.labels[first + r];
    labels[r] = -1;
    if (p.ignore_index && label == *p.ignore_index) continue;
    TORCH_CHECK_VALUE(label >= 0 && label < p.classes, "labels: expected in [0, ", p.classes,
                      "), got ", label, " in row ", first + r);
    labels[r] = label;
    Layout::set(e_label, r, lanes[Layout::index(r, label)]);
    if (kTeacher) Layout::set(h_label, r, teacher_lanes[Layout::index(r, label)]);
    Layout::set(scale, r, p.scale);
  }
  const V y_factor = T(1) / moments.sum[moments.kE];
  V x_factor = {};
  if constexpr (kTeacher) x_factor = p.alpha / moments.sum[moments.kH];
  const Row<T, V, kTeacher> row(polynomial, moments, static_cast<T>(p.classes), p.alpha, y_factor,
                                x_factor, e_label, h_label);
  if (p.gradient) {
    const Slope<T, V, kTeacher> slope(polynomial, row.dot, scale, y_factor, x_factor);
    for (int64_t i = 0; i < vectors; ++i) e[i] = slope(e[i], kTeacher ? h[i] : V{});
    const V at_label = scale * row.label_y * row.label_df;
    for (int64_t r = 0; r < rows; ++r) {
      if (labels[r] >= 0) lanes[Layout::index(r, labels[r])] += at_label[Layout::lane(r)];
    }
    store<Layout, T>(p.gradient + first * p.classes, e, rows, p.classes);
  }
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T f = labels[r] >= 0 ? row.f[Layout::lane(r)] : T(0);
    if (p.row_losses) p.row_losses[first + r] = p.scale * f;
    total += f;
  }
  return total;
}

// The sum of f over all rows. Chunks of rows have a fixed size and are added in order, so the
// result does not depend on the number of threads.
template <typename Layout, bool kTeacher, typename P>
double batch_sum(const P& p) {
  using V = typename Layout::V;
  constexpr int64_t kChunkRows = 64, kGrainElements = 16384;
  const int64_t chunks = (p.rows + kChunkRows - 1) / kChunkRows;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kChunkRows * p.classes));
  std::vector<double> partial(chunks);
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    struct alignas(V) Storage {
      char bytes[sizeof(V)];
    };
    const int64_t vectors = Layout::vectors(p.classes);
    std::unique_ptr<Storage[]> scratch(new Storage[2 * vectors]);
    V* e = reinterpret_cast<V*>(scratch.get());
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(p.rows, (chunk + 1) * kChunkRows);
      for (int64_t row = chunk * kChunkRows; row < last; row += Layout::kRows) {
        const int64_t rows = std::min(Layout::kRows, last - row);
        partial[chunk] += tile_sum<Layout, kTeacher>(p, p.polynomial, e, e + vectors, row, rows);
      }
    }
  });
  double total = 0;
  for (double sum : partial) total += sum;
  return total;
}

template <template <typename> class Layout, typename T, typename P>
double batch_sum(const P& p) {
  return p.teacher_logits ? batch_sum<Layout<T>, true>(p) : batch_sum<Layout<T>, false>(p);
}

double read_number(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? *tensor.const_data_ptr<double>()
                                             : *tensor.const_data_ptr<float>();
}

template <typename T>
Polynomial<T> read_theta(const Tensor& theta) {
  const Tensor t = theta.contiguous();
  if (t.scalar_type() == at::kDouble) return Polynomial<T>(t.const_data_ptr<double>());
  return Polynomial<T>(t.const_data_ptr<float>());
}

Tensor empty_loss(const Tensor& logits, int64_t reduction) {
  const auto options = logits.options().dtype(accumulate_type(logits));
  return reduction == kNone ? at::empty_symint({logits.sym_size(0)}, options)
                            : at::empty({}, options);
}

// Returns the loss, and fills `gradient` if it is defined.
Tensor loss_on_cpu(TAYLORGLO_PARAMETERS, const Tensor& gradient) {
  check_fit(TAYLORGLO_ARGUMENTS);
  const Tensor z = logits.contiguous(), l = labels.contiguous();
  const Tensor teacher = teacher_logits ? teacher_logits->contiguous() : Tensor();
  const double a = alpha ? read_number(*alpha) : alpha_number.value_or(0);
  const int64_t* first_label = l.const_data_ptr<int64_t>();
  const int64_t rows = z.size(0), classes = z.size(1);
  int64_t kept = rows;
  if (ignore_index) kept -= std::count(first_label, first_label + rows, *ignore_index);
  const double scale = -1.0 / double(classes) / (reduction == kMean ? double(kept) : 1.0);
  Tensor loss = empty_loss(z, reduction);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, z.scalar_type(), "taylorglo_loss", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    using gradient_t = std::conditional_t<std::is_same_v<scalar_t, at::Half>, float, scalar_t>;
    const Problem<scalar_t, T, gradient_t> problem{
        z.const_data_ptr<scalar_t>(),
        teacher.defined() ? teacher.const_data_ptr<scalar_t>() : nullptr,
        first_label,
        gradient.defined() ? gradient.mutable_data_ptr<gradient_t>() : nullptr,
        reduction == kNone ? loss.mutable_data_ptr<T>() : nullptr,
        rows,
        classes,
        ignore_index,
        read_theta<T>(theta),
        static_cast<T>(teacher.defined() ? a : 0),
        static_cast<T>(scale)};
    constexpr int64_t kMostTallClasses = 64;
    const double sum =
        classes <= kMostTallClasses ? batch_sum<Tall, T>(problem) : batch_sum<Wide, T>(problem);
    if (reduction != kNone) *loss.mutable_data_ptr<T>() = static_cast<T>(sum * scale);
  });
  return loss;
}

// Asks for large pages: a new gradient of many megabytes costs more time in page faults than in
// arithmetic.
Tensor empty_gradient(const Tensor& logits) {
  Tensor gradient = at::empty(logits.sizes(), logits.options().dtype(gradient_type(logits)));
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20, kLeastBytes = 8 << 20;
  if (gradient.nbytes() >= kLeastBytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr());
    const uintptr_t first_page = (begin + kLargePage - 1) / kLargePage * kLargePage;
    madvise(reinterpret_cast<void*>(first_page), begin + gradient.nbytes() - first_page,
            MADV_HUGEPAGE);
  }
#endif
  return gradient;
}

Tensor loss_cpu(TAYLORGLO_PARAMETERS) { return loss_on_cpu(TAYLORGLO_ARGUMENTS, Tensor()); }

std::tuple<Tensor, Tensor> loss_and_gradient_cpu(TAYLORGLO_PARAMETERS) {
  const Tensor gradient = empty_gradient(logits);
  return {loss_on_cpu(TAYLORGLO_ARGUMENTS, gradient), gradient};
}

void scale_gradient_cpu(const Tensor& gradient, const Tensor& upstream) {
  if (read_number(upstream) != 1) gradient.mul_(upstream);
}

// ---- Shapes and dtypes alone, for tracing -------------------------------------------------------

Tensor loss_meta(TAYLORGLO_PARAMETERS) {
  check_fit(TAYLORGLO_ARGUMENTS);
  return empty_loss(logits, reduction);
}

std::tuple<Tensor, Tensor> loss_and_gradient_meta(TAYLORGLO_PARAMETERS) {
  return {loss_meta(TAYLORGLO_ARGUMENTS),
          at::empty_symint(logits.sym_sizes(), logits.options().dtype(gradient_type(logits)))};
}

// ---- Autograd -----------------------------------------------------------------------------------

template <typename Signature>
const c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The saved gradient times the gradient of the loss (one number, or one for each row), in `dtype`.
// Without retain_graph nobody reads the saved gradient again, so it is scaled in place; for the
// usual factor 1 that is no work. Traced or batched (vmap) tensors take PyTorch's own operators.
Tensor scale_gradient(const Tensor& gradient, const Tensor& upstream, at::ScalarType dtype) {
  static const auto scale_in_place =
      find_operator<decltype(scale_gradient_cpu)>("taylorglo::scale_gradient_");
  const bool in_place = upstream.dim() == 0 && gradient.scalar_type() == dtype &&
                        !at::isTensorSubclassLike(upstream) &&
                        !at::isTensorSubclassLike(gradient) &&
                        !torch::autograd::get_current_graph_task_keep_graph();
  if (!in_place)
    return at::mul(gradient, upstream.dim() == 0 ? upstream : upstream.unsqueeze(1)).to(dtype);
  scale_in_place.call(gradient, upstream);
  return gradient;
}

// A plain Node, as in PyTorch's own operators: torch::autograd::Function costs about 5 us more, a
// sixth of forward and backward for 128 rows of 10 classes.
struct TaylorGLOLossBackward : torch::autograd::Node {
  torch::autograd::SavedVariable gradient;
  at::ScalarType dtype = at::kFloat;  // of the logits

  torch::autograd::variable_list apply(torch::autograd::variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "taylorglo_loss is differentiable only once, so create_graph=True and "
                "torch.func.grad are not supported; "
                "after taylorglo_ext.load('reference') they are");
    if (!upstream[0].defined()) return {Tensor()};
    return {scale_gradient(gradient.unpack(), upstream[0], dtype)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradient.reset_data();
  }
};

Tensor loss_autograd(TAYLORGLO_PARAMETERS) {
  TORCH_CHECK_NOT_IMPLEMENTED(!logits._fw_grad(/*level=*/0).defined(),
                              "taylorglo_loss has no forward-mode derivative; after "
                              "taylorglo_ext.load('reference') it has");
  static const auto forward = find_operator<decltype(loss_cpu)>("taylorglo::loss");
  static const auto forward_with_gradient =
      find_operator<decltype(loss_and_gradient_cpu)>("taylorglo::loss_and_gradient");
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward.call(TAYLORGLO_ARGUMENTS);
  }
  std::shared_ptr<TaylorGLOLossBackward> node(new TaylorGLOLossBackward(),
                                              torch::autograd::deleteNode);
  node->set_next_edges(torch::autograd::collect_next_edges(logits));
  node->dtype = logits.scalar_type();
  Tensor loss, gradient;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(loss, gradient) = forward_with_gradient.call(TAYLORGLO_ARGUMENTS);
  }
  node->gradient = torch::autograd::SavedVariable(std::move(gradient), /*is_output=*/false);
  torch::autograd::create_gradient_edge(loss, node);
  return loss;
}

#define TAYLORGLO_SCHEMA                                                                           \
  "(Tensor logits, Tensor labels, Tensor theta, Tensor? teacher_logits=None, Tensor? alpha=None, " \
  "float? alpha_number=None, int? ignore_index=None, int reduction=1)"

TORCH_LIBRARY(taylorglo, m) {
  m.def("loss" TAYLORGLO_SCHEMA " -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("loss_and_gradient" TAYLORGLO_SCHEMA " -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor upstream) -> ()",
        {at::Tag::pt2_compliant_tag});
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

}  // namespace
}  // namespace taylorglo
