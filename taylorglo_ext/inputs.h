// What both backends ask of their arguments; reference.py asks the same in Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace taylorglo {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The dtype of the sums and of the loss.
inline at::ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& logits) {
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), name, ": expected on ", logits.device(), " like logits, got ",
                    tensor.device());
}

inline bool is_real(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
}

inline void check_teacher(const Tensor& logits, const MaybeTensor& teacher_logits, const MaybeTensor& alpha,
                          std::optional<double> alpha_number) {
  if (!teacher_logits) {
    TORCH_CHECK_VALUE(!alpha && !alpha_number, "alpha: given without teacher_logits");
    return;
  }
  TORCH_CHECK_VALUE(alpha || alpha_number, "alpha: needed with teacher_logits");
  TORCH_CHECK_TYPE(teacher_logits->scalar_type() == logits.scalar_type(), "teacher_logits: expected ",
                   logits.scalar_type(), " like logits, got ", teacher_logits->scalar_type());
  TORCH_CHECK_VALUE(teacher_logits->sym_sizes() == logits.sym_sizes(), "teacher_logits: expected shape ",
                    logits.sym_sizes(), " like logits, got ", teacher_logits->sym_sizes());
  check_device("teacher_logits", *teacher_logits, logits);
  if (alpha) {
    TORCH_CHECK_VALUE(alpha->dim() == 0 && is_real(*alpha), "alpha: expected a 0-d float32 or float64 tensor, got ",
                      alpha->scalar_type(), " ", alpha->sym_sizes());
    check_device("alpha", *alpha, logits);
  } else {
    TORCH_CHECK_VALUE(*alpha_number >= 0 && *alpha_number <= 1, "alpha: expected a number in [0, 1], got ",
                      *alpha_number);
  }
}

inline void check_inputs(const Tensor& logits, const Tensor& labels, const Tensor& theta,
                         const MaybeTensor& teacher_logits, const MaybeTensor& alpha,
                         std::optional<double> alpha_number) {
  TORCH_CHECK_TYPE(is_real(logits) || logits.scalar_type() == at::kHalf || logits.scalar_type() == at::kBFloat16,
                   "logits: expected float64, float32, float16 or bfloat16, got ", logits.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.sym_size(1) >= 1, "logits: expected shape (B, C) with C >= 1, got ",
                    logits.sym_sizes());
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels: expected int64, got ", labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.sym_size(0) == logits.sym_size(0), "labels: expected shape (",
                    logits.sym_size(0), ",) to match logits, got ", labels.sym_sizes());
  TORCH_CHECK_TYPE(is_real(theta), "theta: expected float32 or float64, got ", theta.scalar_type());
  TORCH_CHECK_VALUE(theta.dim() == 1 && theta.sym_size(0) == 8, "theta: expected shape (8,), got ",
                    theta.sym_sizes());
  check_device("labels", labels, logits);
  check_device("theta", theta, logits);
  check_teacher(logits, teacher_logits, alpha, alpha_number);
}

}  // namespace taylorglo
