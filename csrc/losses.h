// The token loss of a divergence over the whole vocabulary: the values of src/fused_gopd/objective/divergences.py.
//
// Compiled once per instruction set, as policy.h. Comparisons are written so that NaN stays NaN.
#pragma once

#include "policy.h"
#include "rowops.h"

namespace fused_gopd {
namespace GOPD_ISA {

// Not inlined: the same instructions, and so the same bits, for every token.
__attribute__((noinline)) inline float token_loss(const Losses& losses, int64_t row) {
  const auto statistic = [&](Stat stat) { return losses.statistics[stat * losses.statistics_stride + row]; };
  const float logsum = statistic(logsum_student);
  if (logsum == -kInf) return 0.0f;
  const bool reverse_alone = losses.divergence == Divergence::reverse_kl;
  const bool forward_alone = losses.divergence == Divergence::forward_kl;
  if (!reverse_alone && !forward_alone && losses.divergence != Divergence::mixed)
    return at_least(statistic(divergence_value), 0.0f);
  const float forward = at_least(statistic(mean_target_gap) + (logsum - statistic(logsum_target)), 0.0f);
  if (forward_alone) return forward;
  const double lambda = losses.reward_scales != nullptr ? double(losses.reward_scales[row]) : losses.reward_scale;
  const float q = statistic(logsum_teacher), r = statistic(logsum_ref);
  const float mixed = mixed_logprob(lambda, losses.has_teacher ? &q : nullptr, losses.has_ref ? &r : nullptr);
  const float reverse = statistic(mean_gap) + (mixed - logsum);
  if (reverse_alone) return reverse;
  const float w = losses.forward_weights != nullptr ? losses.forward_weights[row] : losses.forward_weight;
  return w * forward + (1.0f - w) * reverse;
}

}  // namespace GOPD_ISA
}  // namespace fused_gopd
