// The CUDA operators: memory, device and stream. The kernels are in taylorglo.cu.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "operator.h"
#include "taylorglo_cuda.h"

namespace taylorglo {

int count_processors(int device) {
  static std::mutex mutex;
  static std::map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& count = known[device];
  if (count == 0)
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

namespace {

Real real(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type() == at::kDouble};
}

// Which of the device's counters a launch uses. A counter wraps back to 0, so no launch has to
// clear it. Two launches that may run at the same time need two counters: the launches on a stream
// share the stream's, and a captured launch takes one for good, since its graph may run beside any
// other. Returns kCounters if none is left.
unsigned take_counter(c10::cuda::CUDAStream stream) {
  static std::mutex mutex;
  static std::map<cudaStream_t, unsigned> of_stream;
  static unsigned taken = 0;
  const bool captured =
      c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  const std::lock_guard<std::mutex> lock(mutex);
  if (captured) return taken < kCounters ? taken++ : kCounters;
  const auto found = of_stream.find(stream);
  if (found != of_stream.end()) return found->second;
  return taken < kCounters ? of_stream[stream] = taken++ : kCounters;
}

// Returns the loss, and fills `gradient` if it is defined.
Tensor loss_on_cuda(TAYLORGLO_PARAMETERS, const Tensor& gradient) {
  check_fit(TAYLORGLO_ARGUMENTS);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor z = logits.contiguous(), l = labels.contiguous(), t = theta.contiguous();
  const Tensor teacher = teacher_logits ? teacher_logits->contiguous() : Tensor();
  const auto options = z.options().dtype(accumulate_type(z));
  const Tensor loss = reduction == kNone ? at::empty({z.size(0)}, options) : at::empty({}, options);
  const Tensor workspace = at::empty({kMostBlocks + 2}, z.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, z.scalar_type(), "taylorglo_loss", [&] {
    Problem<scalar_t> p{};
    p.logits = z.const_data_ptr<scalar_t>();
    p.teacher_logits = teacher.defined() ? teacher.const_data_ptr<scalar_t>() : nullptr;
    p.labels = l.const_data_ptr<int64_t>();
    p.gradient = gradient.defined() ? gradient.mutable_data_ptr<Gradient<scalar_t>>() : nullptr;
    p.loss = loss.mutable_data_ptr<Accumulate<scalar_t>>();
    p.rows = z.size(0);
    p.classes = z.size(1);
    p.theta = real(t);
    p.alpha = alpha ? real(*alpha) : Real{nullptr, false};
    p.alpha_number = alpha_number.value_or(0);
    p.partial = workspace.mutable_data_ptr<double>();
    if (ignore_index) p.kept = reinterpret_cast<int64_t*>(p.partial + kMostBlocks);
    p.ignore_index = ignore_index.value_or(0);
    p.row_losses = reduction == kNone;
    p.mean = reduction == kMean;
    p.scale = -1.0 / double(p.classes) / (p.mean && !p.kept ? double(p.rows) : 1.0);
    p.counter = take_counter(stream);
    if (p.counter == kCounters) {
      p.blocks_done = reinterpret_cast<unsigned*>(p.partial + kMostBlocks + 1);
      C10_CUDA_CHECK(cudaMemsetAsync(p.blocks_done, 0, sizeof(unsigned), stream));
    }
    launch_loss(p, count_processors(z.get_device()), stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return loss;
}

Tensor loss_cuda(TAYLORGLO_PARAMETERS) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return loss_on_cuda(TAYLORGLO_ARGUMENTS, Tensor());
}

std::tuple<Tensor, Tensor> loss_and_gradient_cuda(TAYLORGLO_PARAMETERS) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor gradient = at::empty(logits.sizes(), logits.options().dtype(gradient_type(logits)));
  return {loss_on_cuda(TAYLORGLO_ARGUMENTS, gradient), gradient};
}

void scale_gradient_cuda(const Tensor& gradient, const Tensor& upstream) {
  if (gradient.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(gradient.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, gradient.scalar_type(), "scale_gradient", [&] {
    launch_scale(gradient.mutable_data_ptr<scalar_t>(), gradient.numel(), real(upstream), stream);
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
