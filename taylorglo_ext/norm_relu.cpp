// Batch normalisation in training with ReLU as CUDA operators: schema, checks, memory, device and
// stream. The kernels are in norm_relu.cu. norm_relu.py decides when to use them.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "norm_relu.h"
#include "taylorglo_cuda.h"

namespace taylorglo {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// The tensor, or a copy of it, channels last and from a 16-byte boundary.
Tensor laid_out(const Tensor& tensor) {
  const Tensor t = tensor.contiguous(kLast);
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : t.clone(kLast);
}

bool is_like(const Tensor& tensor, const Tensor& x) {
  return tensor.sizes() == x.sizes() && tensor.scalar_type() == x.scalar_type() &&
         tensor.device() == x.device();
}

// Whether a tensor has `count` float32 numbers on the device of x.
bool is_of(const Tensor& numbers, const Tensor& x, int64_t count) {
  return numbers.numel() == count && numbers.scalar_type() == at::kFloat &&
         numbers.device() == x.device() && numbers.is_contiguous();
}

void check(bool fits) {
  TORCH_CHECK_VALUE(fits, "taylorglo: arguments that do not fit; norm_relu.py asks what does");
}

// x must be (N, C, H, W) with at least two rows, and C must fill whole vectors of 16 bytes.
void check_x(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x.dim() == 4 && x.size(1) > 0 && x.size(1) * x.element_size() % 16 == 0 &&
        x.numel() > x.size(1) && x.numel() / x.size(1) < (int64_t(1) << 31) &&
        is_of(weight, x, x.size(1)) && is_of(bias, x, x.size(1)));
}

Layout layout_of(const Tensor& x) {
  const int vectors = static_cast<int>(x.size(1) * x.element_size() / 16);
  return Layout(x.numel() / x.size(1), vectors, count_processors(x.get_device()));
}

// Memory for the records that the first kernel writes for the second.
Tensor empty_records(const Tensor& x, const Layout& layout) {
  const int vector = 16 / static_cast<int>(x.element_size());
  return at::empty({layout.record(vector, layout.slices, 0)}, x.options().dtype(at::kFloat));
}

template <typename Call>
void for_dtype(const Tensor& x, const Call& call) {
  AT_DISPATCH_SWITCH(x.scalar_type(), "norm_relu",
                     AT_DISPATCH_CASE(at::kFloat, [&] { call(scalar_t()); })
                         AT_DISPATCH_CASE(at::kHalf, [&] { call(scalar_t()); })
                             AT_DISPATCH_CASE(at::kBFloat16, [&] { call(scalar_t()); }));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Returns y, and for the backward (2, C): the means and 1 / standard deviation.
std::tuple<Tensor, Tensor> norm_relu(const Tensor& any_x, const Tensor& weight, const Tensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var,
                                     const MaybeTensor& any_shortcut, double eps, double momentum) {
  check_x(any_x, weight, bias);
  const int64_t channels = any_x.size(1), rows = any_x.numel() / channels;
  check(is_of(running_mean, any_x, channels) && is_of(running_var, any_x, channels) &&
        (!any_shortcut || is_like(*any_shortcut, any_x)));
  const c10::cuda::CUDAGuard guard(any_x.device());
  const Tensor x = laid_out(any_x), shortcut = any_shortcut ? laid_out(*any_shortcut) : Tensor();
  const Layout layout = layout_of(x);
  const Tensor y = at::empty(x.sizes(), x.options(), kLast);
  const Tensor saved = at::empty({2, channels}, weight.options());
  const Tensor records = empty_records(x, layout);
  for_dtype(x, [&](auto number) {
    using scalar_t = decltype(number);
    launch(
        NormRelu<scalar_t>{
            x.const_data_ptr<scalar_t>(),
            shortcut.defined() ? shortcut.const_data_ptr<scalar_t>() : nullptr,
            y.mutable_data_ptr<scalar_t>(),
            weight.const_data_ptr<float>(),
            bias.const_data_ptr<float>(),
            running_mean.mutable_data_ptr<float>(),
            running_var.mutable_data_ptr<float>(),
            saved.mutable_data_ptr<float>(),
            records.mutable_data_ptr<float>(),
            static_cast<unsigned>(rows),
            static_cast<int>(channels),
            layout,
            static_cast<float>(eps),
            static_cast<float>(momentum),
            static_cast<float>(double(rows) / double(rows - 1)),
        },
        c10::cuda::getCurrentCUDAStream());
  });
  return {y, saved};
}

// y is given if there is a shortcut. Returns the gradients of x, weight, bias and the shortcut;
// without a shortcut the last one is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_relu_backward(
    const Tensor& any_dy, const Tensor& any_x, const MaybeTensor& any_y, const Tensor& weight,
    const Tensor& bias, const Tensor& saved) {
  check_x(any_x, weight, bias);
  check(is_like(any_dy, any_x) && (!any_y || is_like(*any_y, any_x)) &&
        is_of(saved, any_x, 2 * any_x.size(1)));
  const c10::cuda::CUDAGuard guard(any_x.device());
  const Tensor dy = laid_out(any_dy), x = laid_out(any_x);
  const Tensor y = any_y ? laid_out(*any_y) : Tensor();
  const Layout layout = layout_of(x);
  const Tensor dx = at::empty(x.sizes(), x.options(), kLast);
  const Tensor dshortcut =
      y.defined() ? at::empty(x.sizes(), x.options(), kLast) : at::empty({0}, x.options());
  const Tensor dweight = at::empty_like(weight), dbias = at::empty_like(bias);
  const Tensor records = empty_records(x, layout);
  for_dtype(x, [&](auto number) {
    using scalar_t = decltype(number);
    launch(
        NormReluBackward<scalar_t>{
            dy.const_data_ptr<scalar_t>(),
            x.const_data_ptr<scalar_t>(),
            y.defined() ? y.const_data_ptr<scalar_t>() : nullptr,
            y.defined() ? dshortcut.mutable_data_ptr<scalar_t>() : nullptr,
            dx.mutable_data_ptr<scalar_t>(),
            weight.const_data_ptr<float>(),
            bias.const_data_ptr<float>(),
            saved.const_data_ptr<float>(),
            dweight.mutable_data_ptr<float>(),
            dbias.mutable_data_ptr<float>(),
            records.mutable_data_ptr<float>(),
            static_cast<unsigned>(x.numel() / x.size(1)),
            static_cast<int>(x.size(1)),
            layout,
        },
        c10::cuda::getCurrentCUDAStream());
  });
  return {dx, dweight, dbias, dshortcut};
}

// ---- Shapes and dtypes alone, for tracing -------------------------------------------------------

std::tuple<Tensor, Tensor> norm_relu_meta(const Tensor& x, const Tensor& weight, const Tensor&,
                                          const Tensor&, const Tensor&, const MaybeTensor&, double,
                                          double) {
  return {at::empty_symint(x.sym_sizes(), x.options(), kLast),
          at::empty_symint({2, x.sym_size(1)}, weight.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_relu_backward_meta(
    const Tensor&, const Tensor& x, const MaybeTensor& y, const Tensor& weight, const Tensor& bias,
    const Tensor&) {
  const Tensor dx = at::empty_symint(x.sym_sizes(), x.options(), kLast);
  return {dx, at::empty_like(weight), at::empty_like(bias),
          y ? at::empty_like(dx) : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(taylorglo, m) {
  m.def(
      "norm_relu(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor? shortcut, float eps, float momentum) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "norm_relu_backward(Tensor dy, Tensor x, Tensor? y, Tensor weight, Tensor bias, "
      "Tensor saved) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(taylorglo, CUDA, m) {
  m.impl("norm_relu", &norm_relu);
  m.impl("norm_relu_backward", &norm_relu_backward);
}

TORCH_LIBRARY_IMPL(taylorglo, Meta, m) {
  m.impl("norm_relu", &norm_relu_meta);
  m.impl("norm_relu_backward", &norm_relu_backward_meta);
}

}  // namespace taylorglo
