// The policy loss of a sampled token: the formulas of src/fused_gopd/objective/policy.py, with ratios of single tokens.
//
// Compiled once per instruction set, as vec.h. Comparisons are written so that NaN stays NaN.
#pragma once

#include "rowops.h"
#include "vec.h"

namespace fused_gopd {
namespace GOPD_ISA {

// Rows of fused_gopd.rowops.PolicyStat, in its order.
struct PolicyTerm {
  float loss, dlogprob, advantage, clipped, importance;
};

inline float at_least(float x, float low) { return x < low ? low : x; }
inline float at_most(float x, float high) { return x > high ? high : x; }
inline float within(float x, float low, float high) { return at_most(at_least(x, low), high); }

inline float token_logprob(const TokenScores& scores, int64_t row) {
  const float logsum = scores.statistics[logsum_student * scores.stride + row];
  return logsum == -kInf ? logsum : scores.statistics[logit_student * scores.stride + row] - logsum;
}

// lambda q + (1 - lambda) r as objective/target.py forms it; a model that is not there has cancelled.
inline float mixed_logprob(double lambda, const float* q, const float* r) {
  if (r == nullptr) return *q;
  if (q == nullptr) return *r;
  const bool near_teacher = lambda > 0.5;
  const float near = near_teacher ? *q : *r, share = float(near_teacher ? lambda - 1.0 : lambda);
  if (share == 0.0f) return near;
  const float gap = *q - *r;
  return within(near + share * gap, -kMaxFloat, kMaxFloat) + 0.0f * gap;
}

// Not inlined: the same instructions, and so the same bits, wherever it is called.
__attribute__((noinline)) inline PolicyTerm policy_term(const Policy& policy, const TokenScores& scores, int64_t row) {
  const PolicyRule& rule = policy.rule;
  const float student = token_logprob(scores, row);
  const float behaviour = policy.old_logprobs != nullptr ? policy.old_logprobs[row] : student;
  const bool per_token = policy.reward_scales != nullptr;
  const double lambda = per_token ? double(policy.reward_scales[row]) : policy.reward_scale;
  bool outside = behaviour == -kInf;
  float q = 0.0f, r = 0.0f;
  const float *teacher = nullptr, *ref = nullptr;
  if (policy.teacher.statistics != nullptr) {
    q = at_least(token_logprob(policy.teacher, row), rule.logprob_min);
    outside = outside || (q == -kInf && !(per_token && lambda == 0.0));
    teacher = &q;
  }
  if (policy.ref.statistics != nullptr) {
    r = at_least(token_logprob(policy.ref, row), rule.logprob_min);
    outside = outside || (r == -kInf && !(per_token && lambda == 1.0));
    ref = &r;
  }
  float advantage = mixed_logprob(lambda, teacher, ref) - behaviour;
  advantage = within(advantage, -kMaxFloat, kMaxFloat) + 0.0f * behaviour;
  advantage = outside ? 0.0f : within(advantage, rule.advantage_low, rule.advantage_high);

  const float ratio = policy.old_logprobs != nullptr ? __builtin_expf(student - behaviour) : 1.0f;
  float loss = -advantage * ratio;
  const float bound = -advantage * within(ratio, rule.ratio_low, rule.ratio_high);
  const bool flat = bound > loss;
  loss = flat ? bound : loss;
  const float dual_bound = -advantage * rule.clip_dual;
  const bool over = advantage < 0.0f && loss > dual_bound;
  loss = over ? dual_bound : loss;
  float importance = 1.0f;
  if (policy.rollout_logprobs != nullptr) {
    const float log_weight = behaviour == -kInf ? 0.0f : behaviour - policy.rollout_logprobs[row];
    importance = at_most(__builtin_expf(log_weight), rule.importance_cap);
    loss *= importance;
  }
  if (advantage == 0.0f || importance == 0.0f) loss = 0.0f;  // whatever it is multiplied by
  const bool clipped = flat || over;
  return {loss, clipped || student == -kInf ? 0.0f : loss, advantage, clipped ? 1.0f : 0.0f, importance};
}

}  // namespace GOPD_ISA
}  // namespace fused_gopd
