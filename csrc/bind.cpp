// Python's view of the row kernels: fused_gopd._native. Takes addresses, which rowops/native.py has validated.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "rowops.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fused_gopd;

namespace {

std::atomic<int64_t> launch_count{0};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// FUSED_GOPD_ISA is read here, once per process, at the first use of the kernels.
const Kernels& chosen_kernels() {
  static const Kernels& kernels = []() -> const Kernels& {
    const char* name = std::getenv("FUSED_GOPD_ISA");
    try {
      return find_kernels(name == nullptr ? "" : name);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string("FUSED_GOPD_ISA: ") + error.what());
    }
  }();
  return kernels;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    try {
      names.emplace_back(find_kernels(name).isa);
    } catch (const std::runtime_error&) {
    }
  }
  return names;
}

void run_job(const Job& job, int threads) {
  const Kernels& kernels = chosen_kernels();
  nb::gil_scoped_release release;
  run(kernels, job, threads);
  ++launch_count;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "C++ row kernels of fused_gopd for CPU; called by fused_gopd.rowops.native alone";

  nb::list names;
  for (const DivergenceKind& kind : divergence_kinds) names.append(kind.name);
  m.attr("KINDS") = nb::tuple(names);

  nb::class_<Model>(m, "Model")
      .def(
          "__init__",
          [](Model* self, uintptr_t raw, int64_t row_stride, int dtype, uintptr_t bias, float input_scale,
             float output_scale, bool softcap) {
            new (self) Model{pointer<const void>(raw),
                             row_stride,
                             static_cast<DType>(dtype),
                             pointer<const float>(bias),
                             input_scale,
                             output_scale,
                             softcap};
          },
          "raw"_a, "row_stride"_a, "dtype"_a, "bias"_a, "input_scale"_a, "output_scale"_a, "softcap"_a);

  nb::class_<Job>(m, "Job")
      .def(
          "__init__",
          [](Job* self, int64_t rows, int64_t vocab, const Model& student, const Model* teacher, const Model* ref,
             double reward_scale, uintptr_t reward_scales, uintptr_t token_ids, int divergence,
             const std::vector<double>& constants, float forward_weight, uintptr_t forward_weights,
             uintptr_t statistics) {
            new (self) Job();
            self->rows = rows;
            self->vocab = vocab;
            self->student = student;
            if (teacher != nullptr) self->teacher = *teacher;
            if (ref != nullptr) self->ref = *ref;
            self->reward_scale = reward_scale;
            self->reward_scales = pointer<const float>(reward_scales);
            self->token_ids = pointer<const int64_t>(token_ids);
            self->divergence = static_cast<Divergence>(divergence);
            set_constants(*self, constants.data(), constants.size());
            self->forward_weight = forward_weight;
            self->forward_weights = pointer<const float>(forward_weights);
            self->statistics = pointer<float>(statistics);
          },
          "rows"_a, "vocab"_a, "student"_a, "teacher"_a.none(), "ref"_a.none(), "reward_scale"_a, "reward_scales"_a,
          "token_ids"_a, "divergence"_a, "constants"_a, "forward_weight"_a, "forward_weights"_a, "statistics"_a)
      .def(
          "request_statistics", [](Job& job) { job.compute_statistics = true; }, "Have run() write the statistics.")
      .def(
          "request_second_round", [](Job& job) { job.compute_second_round = true; },
          "Have run() replace centre and value by their sums over these columns, from the other statistics.")
      .def(
          "request_gradient",
          [](Job& job, uintptr_t divergence_weights, uintptr_t token_weights, uintptr_t out, int64_t out_stride,
             int out_dtype, bool stream) {
            job.compute_gradient = true;
            job.divergence_weights = pointer<const float>(divergence_weights);
            job.token_weights = pointer<const float>(token_weights);
            job.out = pointer<void>(out);
            job.out_stride = out_stride;
            job.out_dtype = static_cast<DType>(out_dtype);
            job.stream_out = stream;
          },
          "divergence_weights"_a, "token_weights"_a, "out"_a, "out_stride"_a, "out_dtype"_a, "stream"_a,
          "Have run() write the gradient, from the statistics.");

  m.def("run", &run_job, "job"_a, "threads"_a, "Compute what the job was asked for, without the GIL.");
  m.def(
      "isa", [] { return std::string(chosen_kernels().isa); },
      "The instruction set in use: the best of available_isas(), or FUSED_GOPD_ISA as read at the first use.");
  m.def("available_isas", &available_isas, "The instruction sets that this machine has kernels for.");
  m.def("launches", [] { return launch_count.load(); }, "How many jobs have run in this process.");
  m.def(
      "map",
      [](const std::string& function, uintptr_t values, int64_t n) {
        if (function != "exp" && function != "log" && function != "tanh")
          throw std::invalid_argument("function must be exp, log or tanh, got " + function);
        if (values == 0 || n < 0 || n % 16 != 0)
          throw std::invalid_argument("values must be an address, and n a multiple of 16, got " + std::to_string(n));
        chosen_kernels().map(function.c_str(), pointer<float>(values), n);
      },
      "function"_a, "values"_a, "n"_a, "The kernels' own exp, log or tanh, in place on n float32: for tests.");
}
