// SparseMixer in float64 on LibTorch: the truth that kernels/host/sparse_mixer.h answers to.
//
// Liu et al., arXiv 2310.00811, and SparseMixer-v2, arXiv 2409.12136; as code modeling_phimoe.py of transformers, line
// 605 of v4.57.6 and 339 of v5.23.0. Symbols: T tokens, E experts, two picks a token.
#pragma once

#include <ATen/core/Tensor.h>

namespace moeaudit::reference {

struct Mixed {
  at::Tensor chosen;         // int64 [T, 2]
  at::Tensor weights;        // float64 [T, 2]; at evaluation differentiable
  at::Tensor kept;           // bool [T, 2, E]: within 2 jitter of the largest; not what pick 0 took
  at::Tensor probabilities;  // float64 [T, 2, E]: softmax over these; differentiable
};

/// logits [T, E]. given int64 [T, 2]: the experts that were drawn in training; undefined: evaluation. draws [T, 2]: the
/// uniform numbers that decide on the midpoint; undefined: all 1. Throws c10::Error for draws without given experts.
Mixed sparse_mixer(const at::Tensor& logits, double jitter, const at::Tensor& given = {}, const at::Tensor& draws = {});

/// What the autograd function of training returns for the logits, d loss / d weights [T, 2] given.
at::Tensor sparse_mixer_gradient(const Mixed& mixed, const at::Tensor& upstream);

}  // namespace moeaudit::reference
