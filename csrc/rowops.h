// What a row operation computes on, and the kernels that compute it. No PyTorch and no Python here.
//
// The formulas are those of src/fused_gopd/rowops/__init__.py, under the same names.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fused_gopd {

enum class DType : int { f32, bf16, f16 };
enum class Divergence : int { none, reverse_kl, forward_kl, mixed, mixture, alpha };

// What Python calls each Divergence, and how many constants it has.
struct DivergenceKind {
  const char* name;
  size_t constants;
};
constexpr DivergenceKind divergence_kinds[] = {{"none", 0},  {"reverse_kl", 0}, {"forward_kl", 0},
                                               {"mixed", 0}, {"mixture", 7},    {"alpha", 1}};

// Rows of the (stat_count, C) statistics; the order is that of fused_gopd.rowops.Stat.
enum Stat : int {
  logsum_student,
  logsum_teacher,
  logsum_ref,
  logsum_target,
  mean_logit,
  mean_gap,
  centre,
  divergence_value,
  mean_target_gap = divergence_value,
  logit_student,
  logit_teacher,
  logit_ref,
  max_student,
  max_teacher,
  max_ref,
  origin_target,
  stat_count
};

// The raw logits x of one model and the transform that makes them z:
//   without softcap   z = input_scale (x + bias)
//   with softcap      z = output_scale tanh(input_scale (x + bias)), where -inf stays -inf
struct Model {
  const void* raw = nullptr;  // (C, >= V) of dtype at any address; nullptr: the problem has no such model
  int64_t row_stride = 0;     // in elements; 0 repeats one row
  DType dtype = DType::f32;
  const float* bias = nullptr;  // (V,) or nullptr
  float input_scale = 1.0f;
  float output_scale = 1.0f;
  bool softcap = false;
};

// m = b t + (1 - b) p of L = c_t KL(t|m) + c_p KL(p|m), and kappa = c_p b - c_t (1 - b), which is 0 for the JSD; for
// turn and near_end see rowops/__init__.py.
struct Mixture {
  float b = 0.5f, one_minus_b = 0.5f;
  float turn = 0.0f;
  bool near_end = false;
  float c_t = 0.5f, c_p = 0.5f, kappa = 0.0f;
};

// The numbers of a policy loss, fused_gopd.rowops.PolicyRule. A step that is left out has numbers that change nothing.
struct PolicyRule {
  float logprob_min = -__builtin_huge_valf();
  float advantage_low = -__builtin_huge_valf(), advantage_high = __builtin_huge_valf();
  float ratio_low = -__builtin_huge_valf(), ratio_high = __builtin_huge_valf();  // 1 - low and 1 + high of clip
  float clip_dual = __builtin_huge_valf();
  float importance_cap = __builtin_huge_valf();
};

// The sampled tokens of one model that was scored alone: logit_student and logsum_student of these are read.
struct TokenScores {
  const float* statistics = nullptr;  // (stat_count, C)
  int64_t stride = 0;                 // from one statistic to the next, in elements
};

// fused_gopd.rowops.Policy
struct Policy {
  PolicyRule rule;
  double reward_scale = 1.0;             // lambda of every token, unless
  const float* reward_scales = nullptr;  // (C,) gives one per token
  TokenScores teacher, ref;              // one of them at least
  const float* old_logprobs = nullptr;   // (C,) or nullptr, like the next
  const float* rollout_logprobs = nullptr;
};

// What the token losses of a divergence are made from.
struct Losses {
  Divergence divergence = Divergence::none;  // one of the others
  double reward_scale = 1.0;                 // lambda of every token, unless
  const float* reward_scales = nullptr;      // (C,) gives one per token
  bool has_teacher = false, has_ref = false;
  float forward_weight = 0.5f;             // of Divergence::mixed: w of every token, unless
  const float* forward_weights = nullptr;  // (C,) gives one per token
  const float* statistics = nullptr;       // (stat_count, C)
  int64_t statistics_stride = 0;           // from one statistic to the next, in elements
};

struct Job {
  int64_t rows = 0;   // C
  int64_t vocab = 0;  // V
  Model student, teacher, ref;
  double reward_scale = 1.0;             // lambda of every row, unless
  const float* reward_scales = nullptr;  // (C,) gives one per row
  const int64_t* token_ids = nullptr;    // (C,) or nullptr
  Divergence divergence = Divergence::none;
  Mixture mixture;                         // of Divergence::mixture
  double alpha = 0.5;                      // of Divergence::alpha; not 0 or 1
  float forward_weight = 0.5f;             // of Divergence::mixed: w of every row, unless
  const float* forward_weights = nullptr;  // (C,) gives one per row

  bool compute_statistics = false;
  bool compute_second_round = false;  // centre and value, from the other statistics
  bool compute_gradient = false;
  float* statistics = nullptr;    // (stat_count, C): written by the one, read by the other
  int64_t statistics_stride = 0;  // from one statistic to the next, in elements

  const float* divergence_weights = nullptr;                      // (C,) or nullptr
  const float* token_weights = nullptr;                           // (C,) or nullptr
  int64_t divergence_weight_stride = 1, token_weight_stride = 1;  // in elements; 0 is one number for all rows
  const Policy* policy = nullptr;  // the token weights are times minus its derivative, and 1 where there are none
  void* out = nullptr;  // (C, >= V) of out_dtype; may start where student.raw does, row by row, if it is not wider
  int64_t out_stride = 0;
  DType out_dtype = DType::f32;
  bool stream_out = false;  // store past the caches: for an out that is too large to be found there again
};

// The log-probs of one more model on top of a sum of models; fused_gopd/objective/combination.py has the formulas.
struct Addition {
  int64_t rows = 0;   // C
  int64_t vocab = 0;  // V
  Model model;
  const float* maximum = nullptr;  // (C,) of the model's own rows, like the next
  const float* logsum = nullptr;
  double weight = 1.0;             // of every row, unless
  const float* weights = nullptr;  // (C,) gives one per row
  double total_weight = 1.0;       // the sum of the absolute weights of all models, likewise
  const float* total_weights = nullptr;
  bool mixture = false;
  bool first = false;      // nothing is in out
  bool last = false;       // no other model follows
  float* out = nullptr;    // (C, >= V)
  int64_t out_stride = 0;  // in elements
};

// Fills the mixture or alpha from their numbers in the order above; other divergences have none. Throws
// std::invalid_argument where it is another number of them.
void set_constants(Job& job, const double* constants, size_t count);

// One instruction set's kernels.
struct Kernels {
  const char* isa;
  void (*row)(const Job& job, int64_t row);  // statistics, gradient or both of one row
  // rows of PolicyStat (5, rows) from the student's statistics
  void (*policy)(const Policy& policy, const TokenScores& student, int64_t rows, float* out, int64_t out_stride);
  void (*losses)(const Losses& losses, int64_t rows, float* out);  // out is (rows,)
  void (*add)(const Addition& addition, int64_t row);
  void (*map)(const char* function, float* values, int64_t n);  // exp, log or tanh in place, n a multiple of 16
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// The kernels for a name, or for "" the best that this machine has. Throws std::runtime_error where the name is
// unknown or the machine lacks the instructions.
const Kernels& find_kernels(const char* isa);

// Calls part(first, last, context) for parts of [begin, end) of at least grain each, on several threads. The signature
// is that of torch_parallel_for in PyTorch's stable C interface; anything but 0 says that it failed.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*part)(int64_t first, int64_t last, void* context), void* context);

// All rows, shared out over threads; in this thread where parallel_for is null. A row is computed by one thread from
// beginning to end, so the bits do not depend on the number of threads; fewer rows than threads leave threads idle,
// which at chunks of hundreds of rows is rare.
void run(const Kernels& kernels, const Job& job, ParallelFor parallel_for);
void add(const Kernels& kernels, const Addition& addition, ParallelFor parallel_for);

}  // namespace fused_gopd
