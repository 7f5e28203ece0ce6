// The CUDA operators: checks, memory, device and stream; the kernels are in taylorglo.cu.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "inputs.h"
#include "taylorglo_cuda.h"

namespace taylorglo {
namespace {

Real real(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type() == at::kDouble}; }

// Returns the loss; fills `gradient` if it is defined.
Tensor compute(const Tensor& logits, const Tensor& labels, const Tensor& theta, const MaybeTensor& teacher_logits,
               const MaybeTensor& alpha, std::optional<double> alpha_number, const Tensor& gradient) {
  const Tensor z = logits.contiguous(), l = labels.contiguous(), t = theta.contiguous();
  const Tensor teacher = teacher_logits ? teacher_logits->contiguous() : Tensor();
  const Tensor loss = at::empty({}, z.options().dtype(accumulate_type(z)));
  const Tensor workspace = at::empty({kMostBlocks + 1}, z.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, z.scalar_type(), "taylorglo_loss", [&] {
    Problem<scalar_t> p{};
    p.logits = z.const_data_ptr<scalar_t>();
    p.teacher_logits = teacher.defined() ? teacher.const_data_ptr<scalar_t>() : nullptr;
    p.labels = l.const_data_ptr<int64_t>();
    p.gradient = gradient.defined() ? gradient.mutable_data_ptr<scalar_t>() : nullptr;
    p.rows = z.size(0);
    p.classes = z.size(1);
    p.theta = real(t);
    p.alpha = alpha ? real(*alpha) : Real{nullptr, false};
    p.alpha_number = alpha_number.value_or(0);
    p.scale = -1.0 / (double(p.rows) * double(p.classes));
    p.loss = loss.mutable_data_ptr<Accumulate<scalar_t>>();
    p.partial = workspace.mutable_data_ptr<double>();
    p.blocks_done = reinterpret_cast<unsigned*>(p.partial + kMostBlocks);
    launch_loss(p, c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return loss;
}

Tensor loss_cuda(const Tensor& logits, const Tensor& labels, const Tensor& theta, const MaybeTensor& teacher_logits,
                 const MaybeTensor& alpha, std::optional<double> alpha_number) {
  check_inputs(logits, labels, theta, teacher_logits, alpha, alpha_number);
  const c10::cuda::CUDAGuard guard(logits.device());
  return compute(logits, labels, theta, teacher_logits, alpha, alpha_number, Tensor());
}

std::tuple<Tensor, Tensor> loss_and_gradient_cuda(const Tensor& logits, const Tensor& labels, const Tensor& theta,
                                                  const MaybeTensor& teacher_logits, const MaybeTensor& alpha,
                                                  std::optional<double> alpha_number) {
  check_inputs(logits, labels, theta, teacher_logits, alpha, alpha_number);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor gradient = at::empty_like(logits, at::MemoryFormat::Contiguous);
  return {compute(logits, labels, theta, teacher_logits, alpha, alpha_number, gradient), gradient};
}

void scale_gradient_cuda(const Tensor& gradient, const Tensor& upstream) {
  if (gradient.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(gradient.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gradient.scalar_type(), "scale_gradient", [&] {
    launch_scale(gradient.mutable_data_ptr<scalar_t>(), gradient.numel(), real(upstream),
                 c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(taylorglo, CUDA, m) {
  m.impl("loss", &loss_cuda);
  m.impl("loss_and_gradient", &loss_and_gradient_cuda);
  m.impl("scale_gradient_", &scale_gradient_cuda);
}

}  // namespace taylorglo
