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

Job* new_job(int64_t rows, int64_t vocab, const Model* student, const Model* teacher, const Model* ref,
             float reward_scale, const float* reward_scales, const int64_t* token_ids, int divergence,
             const double* constants, size_t constant_count, float forward_weight, const float* forward_weights,
             float* statistics) {
  Job* job = new Job();
  job->rows = rows;
  job->vocab = vocab;
  job->student = *student;
  if (teacher != nullptr) job->teacher = *teacher;
  if (ref != nullptr) job->ref = *ref;
  job->reward_scale = reward_scale;
  job->reward_scales = reward_scales;
  job->token_ids = token_ids;
  job->divergence = static_cast<Divergence>(divergence);
  set_constants(*job, constants, constant_count);
  job->forward_weight = forward_weight;
  job->forward_weights = forward_weights;
  job->statistics = statistics;
  return job;
}

void request_statistics(Job* job) { job->compute_statistics = true; }

void request_second_round(Job* job) { job->compute_second_round = true; }

void request_gradient(Job* job, const float* divergence_weights, const float* token_weights, void* out,
                      int64_t out_stride, int out_dtype, bool stream) {
  job->compute_gradient = true;
  job->divergence_weights = divergence_weights;
  job->token_weights = token_weights;
  job->out = out;
  job->out_stride = out_stride;
  job->out_dtype = static_cast<DType>(out_dtype);
  job->stream_out = stream;
}

void run_job(const Job* job, const char* isa) { run(find_kernels(isa), *job, 1); }
}
