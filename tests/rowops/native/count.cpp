// Runs the row kernels of one instruction set under a profiler that counts the instructions of each call of run():
//
//     count ISA
//
// prints the name of each case and calls run() four times for it: statistics of one row of kShort entries, of kLong,
// then statistics and gradient of both. Differences of the lengths are what kLong - kShort more entries cost, without
// what a row costs on its own. Inputs are the same on every machine. See tests/helpers/native_counts.py.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

#include "rowops.h"

using namespace fused_gopd;

namespace {

constexpr int64_t kShort = 4096, kLong = 8192;

struct Case {
  const char* name;
  Divergence divergence;
  int models;
  DType dtype = DType::f32;
  bool softcap = false, holes = false, stream = false;
  Mixture mixture = {};
};

// Room for a row of any dtype, aligned as PyTorch aligns.
struct alignas(64) Storage {
  char bytes[kLong * sizeof(float)];
};

// Odd eighths in (-4, 4): exact in every dtype, and no entry is further above the largest of the first block than the
// kernels' headroom.
void fill(Storage& to, DType dtype, bool holes, std::mt19937& generator) {
  for (int64_t v = 0; v < kLong; ++v) {
    const int eighths = 2 * static_cast<int>(generator() % 32) - 31;
    const bool hole = holes && v % 100 == 99;
    const float x = hole ? -std::numeric_limits<float>::infinity() : 0.125f * static_cast<float>(eighths);
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (dtype == DType::f32) {
      memcpy(to.bytes + 4 * v, &bits, 4);
      continue;
    }
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint16_t half = static_cast<uint16_t>(dtype == DType::bf16 ? bits >> 16
                                                : hole               ? 0xfc00
                                                                     : sign | (magnitude - (112u << 23)) >> 13);
    memcpy(to.bytes + 2 * v, &half, 2);
  }
}

void count(const Kernels& kernels, const Case& c) {
  static Storage logits[3], out;
  static float bias[kLong];
  std::mt19937 generator(1);
  Job job;
  Model* const models[] = {&job.student, &job.teacher, &job.ref};
  for (int i = 0; i < c.models; ++i) {
    fill(logits[i], c.dtype, c.holes, generator);
    Model& m = *models[i];
    m.raw = logits[i].bytes;
    m.row_stride = kLong;
    m.dtype = c.dtype;
    m.softcap = c.softcap;
    if (c.softcap) {
      m.bias = bias;
      m.input_scale = 0.125f;
      m.output_scale = 8.0f;
    }
  }
  const int64_t token_id = 7;
  const float divergence_weight = 0.5f, token_weight = 1.0f;
  float statistics[stat_count];
  job.rows = 1;
  job.reward_scale = c.models == 2 ? 1.0f : 1.25f;
  job.token_ids = &token_id;
  job.divergence = c.divergence;
  job.mixture = c.mixture;
  job.compute_statistics = true;
  job.statistics = statistics;
  job.statistics_stride = 1;
  job.divergence_weights = c.divergence == Divergence::none ? nullptr : &divergence_weight;
  job.token_weights = &token_weight;
  job.out = out.bytes;
  job.out_stride = kLong;
  job.out_dtype = c.dtype;
  job.stream_out = c.stream;
  std::puts(c.name);
  for (const bool gradient : {false, true}) {
    job.compute_gradient = gradient;
    for (const int64_t vocab : {kShort, kLong}) {
      job.vocab = vocab;
      run(kernels, job, nullptr);
    }
  }
}

}  // namespace

int main(int count_of_arguments, char** arguments) {
  if (count_of_arguments != 2) return 2;
  const Kernels& kernels = find_kernels(arguments[1]);
  const Mixture skew_kl = {0.1f, 0.9f, 0.0f, false, 1.0f, 0.0f, -0.9f};
  const Case cases[] = {
      {"sampled float32", Divergence::none, 1},
      {"sampled bfloat16", Divergence::none, 1, DType::bf16},
      {"sampled float16", Divergence::none, 1, DType::f16},
      {"sampled float32, softcap and bias", Divergence::none, 1, DType::f32, true},
      {"reverse_kl float32", Divergence::reverse_kl, 3},
      {"reverse_kl bfloat16", Divergence::reverse_kl, 3, DType::bf16},
      {"reverse_kl float16", Divergence::reverse_kl, 3, DType::f16},
      {"reverse_kl float32, softcap and bias", Divergence::reverse_kl, 3, DType::f32, true},
      {"reverse_kl float32, without a reference", Divergence::reverse_kl, 2},
      {"reverse_kl float32, with -inf", Divergence::reverse_kl, 3, DType::f32, false, true},
      {"reverse_kl float32, stored past the caches", Divergence::reverse_kl, 3, DType::f32, false, false, true},
      {"forward_kl float32", Divergence::forward_kl, 3},
      {"forward_kl bfloat16", Divergence::forward_kl, 3, DType::bf16},
      {"forward_kl float16", Divergence::forward_kl, 3, DType::f16},
      {"forward_kl float32, softcap and bias", Divergence::forward_kl, 3, DType::f32, true},
      {"jsd float32", Divergence::mixture, 3},
      {"jsd bfloat16", Divergence::mixture, 3, DType::bf16},
      {"jsd float16", Divergence::mixture, 3, DType::f16},
      {"jsd float32, softcap and bias", Divergence::mixture, 3, DType::f32, true},
      {"skew_kl float32", Divergence::mixture, 3, DType::f32, false, false, false, skew_kl},
      {"skew_kl bfloat16", Divergence::mixture, 3, DType::bf16, false, false, false, skew_kl},
      {"alpha float32", Divergence::alpha, 3},
      {"alpha bfloat16", Divergence::alpha, 3, DType::bf16},
      {"mixed float32", Divergence::mixed, 3},
      {"mixed bfloat16", Divergence::mixed, 3, DType::bf16},
  };
  for (const Case& c : cases) count(kernels, c);
  return 0;
}
