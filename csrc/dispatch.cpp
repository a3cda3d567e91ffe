// The choice of an instruction set at run time, and the loop over rows. Compiled for the baseline: see vec.h.

#include <stdexcept>
#include <string>

#include "rowops.h"

namespace fused_gopd {

const Kernels& find_kernels(const char* isa) {
  const std::string name = isa;
#if defined(__x86_64__)
  // these report what the operating system has switched on, too
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name.empty() || name == "avx512")) return kernels_avx512;
  if (avx2 && (name.empty() || name == "avx2")) return kernels_avx2;
#endif
  if (name.empty() || name == "baseline") return kernels_baseline;
  if (name == "avx2" || name == "avx512") throw std::runtime_error("this machine has no " + name + " instructions");
  throw std::runtime_error("the instruction set must be one of 'baseline', 'avx2', 'avx512', got '" + name + "'");
}

void set_constants(Job& job, const double* x, size_t count) {
  const size_t expected = divergence_kinds[static_cast<int>(job.divergence)].constants;
  if (count != expected)
    throw std::invalid_argument("the divergence has " + std::to_string(expected) + " constants, got " +
                                std::to_string(count));
  if (job.divergence == Divergence::alpha) job.alpha = x[0];
  if (job.divergence == Divergence::mixture)
    job.mixture = {float(x[0]), float(x[1]), float(x[2]), x[3] != 0.0, float(x[4]), float(x[5]), float(x[6])};
}

namespace {

template <class Work>
void each_row(void (*row)(const Work&, int64_t), const Work& work, ParallelFor parallel_for) {
  struct Context {
    void (*row)(const Work&, int64_t);
    const Work& work;
  } context{row, work};
  const auto part = [](int64_t first, int64_t last, void* address) {
    const Context& context = *static_cast<const Context*>(address);
    for (int64_t row = first; row < last; ++row) context.row(context.work, row);
  };
  if (parallel_for == nullptr) return part(0, work.rows, &context);
  if (parallel_for(0, work.rows, 1, part, &context) != 0) throw std::runtime_error("PyTorch's parallel_for failed");
}

}  // namespace

void run(const Kernels& kernels, const Job& job, ParallelFor parallel_for) { each_row(kernels.row, job, parallel_for); }

void add(const Kernels& kernels, const Addition& addition, ParallelFor parallel_for) {
  each_row(kernels.add, addition, parallel_for);
}

}  // namespace fused_gopd
