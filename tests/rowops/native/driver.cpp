// Runs the row kernels of every instruction set of this machine on exactly-sized heap buffers: a sanitizer sees any
// access outside them. Also compares each set with the baseline. Exits with 0 if all is well.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "rowops.h"

using namespace fused_gopd;

namespace {

std::mt19937 generator(1);
constexpr float kInf = std::numeric_limits<float>::infinity();

int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Rows of random logits that end with the last element of the last row: the allocation has not a byte more.
struct Buffer {
  std::unique_ptr<char[]> bytes;
  size_t size;
  explicit Buffer(size_t size) : bytes(new char[size]), size(size) {}
};

Buffer random_logits(int64_t rows, int64_t stride, int64_t vocab, DType dtype, bool holes) {
  const int64_t elements = rows == 0 ? 0 : (stride == 0 ? vocab : (rows - 1) * stride + vocab);
  Buffer buffer(elements * size_of(dtype));
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (int64_t i = 0; i < elements; ++i) {
    const uint32_t draw = generator();
    const bool hole = holes && draw % 5 == 0;
    if (dtype == DType::f32) {
      const float x = hole ? -kInf : normal(generator);
      memcpy(buffer.bytes.get() + 4 * i, &x, 4);
    } else {
      // finite bit patterns of moderate size; -inf for a hole
      uint16_t x = dtype == DType::bf16 ? 0x3f80 + draw % 0x180 : 0x3c00 + draw % 0xc00;
      if (draw & 0x10000) x |= 0x8000;
      if (hole) x = dtype == DType::bf16 ? 0xff80 : 0xfc00;
      memcpy(buffer.bytes.get() + 2 * i, &x, 2);
    }
  }
  return buffer;
}

struct Result {
  std::vector<float> statistics;
  std::vector<char> out;
};

Result compute(const Kernels& kernels, Job job, size_t out_bytes, bool fused) {
  Result result;
  std::unique_ptr<float[]> statistics(new float[stat_count * job.rows]);
  std::unique_ptr<char[]> out(new char[out_bytes]);
  memset(out.get(), 0, out_bytes);
  job.statistics = statistics.get();
  job.statistics_stride = job.rows;
  job.out = out.get();
  job.compute_statistics = true;
  job.compute_gradient = fused;
  run(kernels, job, nullptr);
  if (!fused) {
    job.compute_statistics = false;
    job.compute_gradient = true;
    run(kernels, job, nullptr);
  }
  result.statistics.assign(statistics.get(), statistics.get() + stat_count * job.rows);
  result.out.assign(out.get(), out.get() + out_bytes);
  return result;
}

bool near(float a, float b, float tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (1.0f + std::fabs(a));
}

struct Kind {
  Divergence divergence;
  Mixture mixture = {};
  double alpha = 0.5;
};

const Kind kinds[] = {
    {Divergence::none},
    {Divergence::reverse_kl},
    {Divergence::forward_kl},
    {Divergence::mixed},
    {Divergence::mixture, {0.3f, 0.7f, 0.0f, false, 0.3f, 0.7f, 0.0f}},
    {Divergence::mixture, {1e-4f, 0.9999f, 9.21024f, true, 1e-4f, 0.9999f, 0.0f}},
    {Divergence::mixture, {0.1f, 0.9f, 0.0f, false, 1.0f, 0.0f, -0.9f}},
    {Divergence::mixture, {0.999f, 0.001f, -6.906755f, true, 0.0f, 1.0f, 0.999f}},
    {Divergence::alpha, {}, -0.5},
    {Divergence::alpha, {}, 0.3},
    {Divergence::alpha, {}, 2.0},
};

int fail(const char* what, const char* isa, int64_t vocab) {
  std::printf("FAILED: %s, %s, V = %lld\n", what, isa, static_cast<long long>(vocab));
  return 1;
}

}  // namespace

int main() {
  std::vector<const Kernels*> all;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    try {
      all.push_back(&find_kernels(isa));
    } catch (const std::runtime_error&) {
    }
  }
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  int64_t jobs = 0;
  for (int64_t vocab : {1, 2, 7, 15, 16, 17, 33, 211, 1000, 1023, 1024, 1025, 2049, 4099}) {
    for (const Kind& kind : kinds) {
      const bool alone = kind.divergence == Divergence::none;
      for (int variant = 0; variant < 12; ++variant) {
        const int64_t rows = 3;
        Job job;
        job.rows = rows;
        job.vocab = vocab;
        std::vector<Buffer> kept;
        std::unique_ptr<float[]> bias(new float[vocab]);
        for (int64_t v = 0; v < vocab; ++v) bias[v] = 0.25f * static_cast<float>(v % 7);
        Model* models[] = {&job.student, &job.teacher, &job.ref};
        for (int i = 0; i < (alone ? 1 : 3); ++i) {
          if ((i == 1 && variant % 6 == 4) || (i == 2 && variant % 6 == 5)) continue;
          Model& m = *models[i];
          m.dtype = dtypes[(variant + (variant % 4 == 3 ? i : 0)) % 3];
          m.row_stride = variant % 4 == 0 ? vocab : variant % 4 == 1 ? 0 : vocab + 2 * variant + 1;
          kept.push_back(random_logits(rows, m.row_stride, vocab, m.dtype, variant % 2 == 1));
          m.raw = kept.back().bytes.get();
          m.bias = variant % 5 == 2 ? bias.get() : nullptr;
          m.softcap = variant % 5 == 3;
          m.input_scale = variant % 5 == 3 ? 0.125f : variant % 5 == 4 ? 0.75f : 1.0f;
          m.output_scale = 8.0f;
        }
        std::unique_ptr<float[]> scales(new float[rows]{0.0f, 1.0f, 1.25f});
        job.reward_scale = variant % 6 == 4 ? 0.0f : variant % 6 == 5 ? 1.0f : 1.25f;
        if (!alone && variant % 6 == 3) job.reward_scales = scales.get();
        std::unique_ptr<int64_t[]> ids(new int64_t[rows]{variant % 2 ? -1 : 0, vocab - (variant % 3 == 0 ? 0 : 1),
                                                         variant % 4 ? vocab / 2 : INT64_MAX});
        job.token_ids = ids.get();
        job.divergence = kind.divergence;
        job.mixture = kind.mixture;
        job.alpha = kind.alpha;
        std::unique_ptr<float[]> forward_weights(new float[rows]{0.0f, 0.25f, 1.0f});
        if (variant % 2 == 0) job.forward_weights = forward_weights.get();
        std::unique_ptr<float[]> w_d(new float[rows]{1.0f, 0.5f, 0.0f}), w_y(new float[rows]{0.0f, -2.0f, 1.0f});
        job.divergence_weights = variant % 7 == 6 ? nullptr : w_d.get();
        job.token_weights = variant % 7 == 5 ? nullptr : w_y.get();
        job.out_dtype = dtypes[variant % 3];
        job.out_stride = vocab + variant % 5;
        job.stream_out = variant % 2 == 0;
        const size_t out_bytes = ((rows - 1) * job.out_stride + vocab) * size_of(job.out_dtype);

        const Result first = compute(*all[0], job, out_bytes, true);
        for (const Kernels* kernels : all) {
          std::unique_ptr<float[]> sum(new float[rows * vocab]());
          const float own[] = {1.0f, 2.0f, -__builtin_huge_valf()};
          const float weights[] = {0.0f, 0.5f, 2.0f};
          Addition addition;
          addition.rows = rows, addition.vocab = vocab, addition.model = job.student;
          addition.maximum = addition.logsum = own;
          addition.weights = addition.total_weights = variant % 3 == 0 ? weights : nullptr;
          addition.mixture = variant % 2 == 0, addition.first = variant % 4 < 2, addition.last = variant % 5 < 2;
          addition.out = sum.get(), addition.out_stride = vocab;
          add(*kernels, addition, nullptr);
          const Result fused = compute(*kernels, job, out_bytes, true),
                       split = compute(*kernels, job, out_bytes, false);
          if (memcmp(fused.statistics.data(), split.statistics.data(), fused.statistics.size() * sizeof(float)) != 0)
            return fail("statistics differ between one call and two", kernels->isa, vocab);
          if (fused.out != split.out) return fail("gradients differ between one call and two", kernels->isa, vocab);
          for (size_t i = 0; i < first.statistics.size(); ++i) {
            if (!near(first.statistics[i], fused.statistics[i], 1e-4f))
              return fail("statistics differ from the baseline's", kernels->isa, vocab);
          }
          if (job.out_dtype == DType::f32) {
            for (size_t i = 0; i < out_bytes; i += 4) {
              float a, b;
              memcpy(&a, first.out.data() + i, 4);
              memcpy(&b, fused.out.data() + i, 4);
              if (!near(a, b, 1e-4f)) return fail("gradients differ from the baseline's", kernels->isa, vocab);
            }
          }
          ++jobs;
          // in place, and narrower in place
          const int64_t stride = job.student.row_stride;
          if (stride < vocab || size_of(job.out_dtype) > size_of(job.student.dtype)) continue;
          Buffer copy(((rows - 1) * stride + vocab) * size_of(job.student.dtype));
          memcpy(copy.bytes.get(), job.student.raw, copy.size);
          Job aliased = job;
          std::unique_ptr<float[]> statistics(new float[stat_count * rows]);
          aliased.statistics = statistics.get();
          aliased.statistics_stride = rows;
          aliased.student.raw = aliased.out = copy.bytes.get();
          aliased.out_stride = stride * size_of(job.student.dtype) / size_of(job.out_dtype);
          aliased.compute_statistics = aliased.compute_gradient = true;
          aliased.stream_out = false;
          run(*kernels, aliased, nullptr);
          for (int64_t row = 0; row < rows; ++row) {
            const int bytes = size_of(job.out_dtype);
            if (memcmp(copy.bytes.get() + row * aliased.out_stride * bytes,
                       fused.out.data() + row * job.out_stride * bytes, vocab * bytes) != 0)
              return fail("in place differs", kernels->isa, vocab);
          }
        }
      }
    }
  }
  for (const Kernels* kernels : all) std::printf("%s: %lld jobs in all\n", kernels->isa, static_cast<long long>(jobs));
  return 0;
}
