// The operator's arguments. taylorglo_ext checks them and names what is wrong. The check here only
// keeps a direct call of the operator from reading beyond its memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>

namespace taylorglo {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

enum Reduction : int64_t { kNone, kMean, kSum };  // as in ATen

#define TAYLORGLO_PARAMETERS                                       \
  const Tensor &logits, const Tensor &labels, const Tensor &theta, \
      const MaybeTensor &teacher_logits, const MaybeTensor &alpha, \
      std::optional<double> alpha_number, std::optional<int64_t> ignore_index, int64_t reduction
#define TAYLORGLO_ARGUMENTS \
  logits, labels, theta, teacher_logits, alpha, alpha_number, ignore_index, reduction

// The dtype of the sums and of the loss.
inline at::ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The dtype of the gradient: float16 cannot hold its small numbers before a loss scale raises them.
inline at::ScalarType gradient_type(const Tensor& logits) {
  return logits.scalar_type() == at::kHalf ? at::kFloat : logits.scalar_type();
}

inline bool is_real(const Tensor& tensor, int64_t dimensions, int64_t numbers) {
  return tensor.dim() == dimensions && tensor.sym_numel() == numbers &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

inline void check_fit(TAYLORGLO_PARAMETERS) {
  const auto device = logits.device();
  const bool fits = logits.dim() == 2 && logits.sym_size(1) >= 1 &&
                    logits.sym_size(1) <= std::numeric_limits<int>::max() &&
                    logits.sym_size(0) < (1 << 30) && labels.dim() == 1 &&
                    labels.sym_size(0) == logits.sym_size(0) && labels.scalar_type() == at::kLong &&
                    labels.device() == device && is_real(theta, 1, 8) && theta.device() == device &&
                    teacher_logits.has_value() == (alpha || alpha_number) &&
                    (!alpha || (is_real(*alpha, 0, 1) && alpha->device() == device)) &&
                    (!alpha_number || (*alpha_number >= 0 && *alpha_number <= 1)) &&
                    (!teacher_logits || (teacher_logits->sym_sizes() == logits.sym_sizes() &&
                                         teacher_logits->scalar_type() == logits.scalar_type() &&
                                         teacher_logits->device() == device));
  TORCH_CHECK_VALUE(
      fits, "taylorglo: arguments that do not fit; taylorglo_ext.taylorglo_loss says which");
}

}  // namespace taylorglo
