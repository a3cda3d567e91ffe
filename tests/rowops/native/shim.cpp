// The row kernels behind functions that ctypes can call, with the arguments of csrc/bind.cpp: fuzz.py runs the
// package's own Python on kernels that are compiled with sanitizers.

#include <cstdint>

#include "rowops.h"

using namespace fused_gopd;

extern "C" {

Model* new_model(const void* raw, int64_t row_stride, int dtype, const float* bias, float input_scale,
                 float output_scale, bool softcap) {
  return new Model{raw, row_stride, static_cast<DType>(dtype), bias, input_scale, output_scale, softcap};
}

PolicyRule* new_rule(float logprob_min, float advantage_low, float advantage_high, float ratio_low, float ratio_high,
                     float clip_dual, float importance_cap) {
  return new PolicyRule{logprob_min, advantage_low, advantage_high, ratio_low, ratio_high, clip_dual, importance_cap};
}

Policy* new_policy(const PolicyRule* rule, double reward_scale, const float* reward_scales, const float* teacher,
                   int64_t teacher_stride, const float* ref, int64_t ref_stride, const float* old_logprobs,
                   const float* rollout_logprobs) {
  return new Policy{*rule,        reward_scale,    reward_scales, {teacher, teacher_stride}, {ref, ref_stride},
                    old_logprobs, rollout_logprobs};
}

void policy(const char* isa, const Policy* policy, int64_t rows, const float* statistics, int64_t statistics_stride,
            float* out, int64_t out_stride) {
  find_kernels(isa).policy(*policy, {statistics, statistics_stride}, rows, out, out_stride);
}

void losses(const char* isa, int divergence, double reward_scale, const float* reward_scales, bool has_teacher,
            bool has_ref, float forward_weight, const float* forward_weights, int64_t rows, const float* statistics,
            int64_t statistics_stride, float* out) {
  const Losses losses{static_cast<Divergence>(divergence),
                      reward_scale,
                      reward_scales,
                      has_teacher,
                      has_ref,
                      forward_weight,
                      forward_weights,
                      statistics,
                      statistics_stride};
  find_kernels(isa).losses(losses, rows, out);
}

// steps: 1 statistics, 2 second round, 4 gradient, as in bind.cpp.
void run(const char* isa, int steps, int64_t rows, int64_t vocab, const Model* student, const Model* teacher,
         const Model* ref, double reward_scale, const float* reward_scales, const int64_t* token_ids, int divergence,
         const double* constants, size_t constant_count, float forward_weight, const float* forward_weights,
         float* statistics, int64_t statistics_stride, const float* divergence_weights,
         int64_t divergence_weight_stride, const float* token_weights, int64_t token_weight_stride, void* out,
         int64_t out_stride, int out_dtype, bool stream_out, const Policy* policy) {
  Job job;
  job.compute_statistics = (steps & 1) != 0;
  job.compute_second_round = (steps & 2) != 0;
  job.compute_gradient = (steps & 4) != 0;
  job.rows = rows;
  job.vocab = vocab;
  job.student = *student;
  if (teacher != nullptr) job.teacher = *teacher;
  if (ref != nullptr) job.ref = *ref;
  job.reward_scale = reward_scale;
  job.reward_scales = reward_scales;
  job.token_ids = token_ids;
  job.divergence = static_cast<Divergence>(divergence);
  set_constants(job, constants, constant_count);
  job.forward_weight = forward_weight;
  job.forward_weights = forward_weights;
  job.statistics = statistics;
  job.statistics_stride = statistics_stride;
  job.divergence_weights = divergence_weights;
  job.divergence_weight_stride = divergence_weight_stride;
  job.token_weights = token_weights;
  job.token_weight_stride = token_weight_stride;
  job.out = out;
  job.out_stride = out_stride;
  job.out_dtype = static_cast<DType>(out_dtype);
  job.stream_out = stream_out;
  job.policy = policy;
  run(find_kernels(isa), job, nullptr);
}
}
