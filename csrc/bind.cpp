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
ParallelFor parallel_for = nullptr;  // rowops/native.py sets it when it loads this module

// What run() is asked for: bits of its argument steps.
namespace steps {
constexpr int statistics = 1, second_round = 2, gradient = 4;
}

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

constexpr int int64_dtype = 3;  // after those of DType

// A tensor as PyTorch's attributes describe it. Reading them takes Python a microsecond a tensor, and a call has five.
class PlainTensor {
 public:
  uintptr_t address = 0;  // 0: not what is asked for; rowops/native.py then finds out why
  int64_t size[2] = {}, stride[2] = {};

  // Of n dimensions and a dtype (DType, or int64_dtype), dense, on the CPU, all of it within its storage, at a multiple
  // of aligned_to bytes.
  PlainTensor(nb::handle x, int dtype, int n, uintptr_t aligned_to) {
    static PyObject* const torch = PyImport_ImportModule("torch");  // these live as long as the process
    static PyObject* const dtypes[] = {
        PyObject_GetAttrString(torch, "float32"), PyObject_GetAttrString(torch, "bfloat16"),
        PyObject_GetAttrString(torch, "float16"), PyObject_GetAttrString(torch, "int64")};
    static PyObject* const strided = PyObject_GetAttrString(torch, "strided");
    static constexpr int64_t itemsizes[] = {4, 2, 2, 8};
    static PyObject* const names[] = {interned("dtype"), interned("layout"), interned("is_cpu"), interned("shape")};
    static PyObject* const methods[] = {interned("is_neg"),          interned("stride"), interned("storage_offset"),
                                        interned("untyped_storage"), interned("nbytes"), interned("data_ptr")};
    if (!is(attribute(x, names[0]), dtypes[dtype]) || !is(attribute(x, names[1]), strided)) return;
    if (!is(attribute(x, names[2]), Py_True) || !is(call(x, methods[0]), Py_False)) return;
    if (!numbers(attribute(x, names[3]), n, size) || !numbers(call(x, methods[1]), n, stride)) return;
    int64_t offset, bytes, found, last = 0;
    if (!number(call(x, methods[2]), &offset) || !number(call(call(x, methods[3]), methods[4]), &bytes)) return;
    for (int i = 0; i < n; ++i) last += (size[i] - 1) * stride[i];
    if (size[0] == 0 || (n == 2 && size[1] == 0)) return;
    if ((offset + last + 1) * itemsizes[dtype] > bytes || !number(call(x, methods[5]), &found)) return;
    if (uintptr_t(found) % aligned_to == 0) address = uintptr_t(found);
  }

 private:
  static PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }
  // A null object where PyTorch raises: whatever is null is not what is asked for.
  static nb::object known(PyObject* x) {
    if (x == nullptr) PyErr_Clear();
    return nb::steal(x);
  }
  static nb::object attribute(nb::handle x, PyObject* name) { return known(PyObject_GetAttr(x.ptr(), name)); }
  static nb::object call(nb::handle x, PyObject* name) {
    PyObject* const self = x.ptr();
    return x.is_valid() ? known(PyObject_VectorcallMethod(name, &self, 1, nullptr)) : nb::object();
  }
  static bool is(const nb::object& x, PyObject* other) { return x.ptr() == other; }
  static bool number(const nb::object& x, int64_t* out) {
    if (!x.is_valid() || !PyLong_Check(x.ptr())) return false;
    *out = PyLong_AsLongLong(x.ptr());
    return true;
  }
  static bool numbers(const nb::object& x, int n, int64_t* out) {
    if (!x.is_valid() || !PyTuple_Check(x.ptr()) || PyTuple_Size(x.ptr()) != n) return false;
    for (int i = 0; i < n; ++i) {
      if (!number(nb::borrow(PyTuple_GetItem(x.ptr(), i)), out + i)) return false;
    }
    return true;
  }
};

// Of (rows,) that needs no copy.
PlainTensor plain_vector(nb::handle x, int dtype, int64_t rows, bool any_stride) {
  PlainTensor found(x, dtype, 1, dtype == int64_dtype ? 8 : 4);
  if (found.size[0] != rows || !(any_stride || found.stride[0] == 1)) found.address = 0;
  return found;
}

// Of (rows, columns) of unit stride whose rows do not overlap: statistics, or with more columns logits, which may begin
// at any address.
PlainTensor plain_matrix(nb::handle x, int dtype, int64_t rows, int64_t columns, bool more_columns) {
  PlainTensor found(x, dtype, 2, more_columns ? 1 : 4);
  const bool wide = more_columns ? found.size[1] >= columns : found.size[1] == columns;
  const bool apart = found.stride[0] >= columns || rows == 1;
  if (found.size[0] != rows || !wide || !apart || found.stride[1] != 1) found.address = 0;
  return found;
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

void run_job(Job& job, int steps) {
  job.compute_statistics = (steps & steps::statistics) != 0;
  job.compute_second_round = (steps & steps::second_round) != 0;
  job.compute_gradient = (steps & steps::gradient) != 0;
  job.stream_out = job.stream_out && job.out != job.student.raw;
  const Kernels& kernels = chosen_kernels();
  nb::gil_scoped_release release;
  run(kernels, job, parallel_for);
  ++launch_count;
}

// What differs between the chunks of a walk: tensors, or None. False where one is not plain, with nothing done.
bool run_plain(Job job, int steps, nb::handle reward_scales, nb::handle forward_weights, nb::handle token_ids,
               nb::handle statistics, nb::handle divergence_weights, nb::handle token_weights, nb::handle out,
               int out_dtype, const Policy* policy) {
  bool plain = true;
  const auto vector = [&](nb::handle x, int dtype, int64_t* stride) -> uintptr_t {
    if (!plain || x.is_none()) return 0;
    const PlainTensor found = plain_vector(x, dtype, job.rows, stride != nullptr);
    if (stride != nullptr) *stride = found.stride[0];
    plain = found.address != 0;
    return found.address;
  };
  const auto matrix = [&](nb::handle x, int dtype, int64_t rows, int64_t columns, bool more, int64_t* stride) {
    if (!plain || x.is_none()) return uintptr_t(0);
    const PlainTensor found = plain_matrix(x, dtype, rows, columns, more);
    *stride = found.stride[0];
    plain = found.address != 0;
    return found.address;
  };
  job.statistics = pointer<float>(matrix(statistics, 0, stat_count, job.rows, false, &job.statistics_stride));
  job.token_ids = pointer<const int64_t>(vector(token_ids, int64_dtype, nullptr));
  job.reward_scales = pointer<const float>(vector(reward_scales, 0, nullptr));
  job.forward_weights = pointer<const float>(vector(forward_weights, 0, nullptr));
  job.divergence_weights = pointer<const float>(vector(divergence_weights, 0, &job.divergence_weight_stride));
  job.token_weights = pointer<const float>(vector(token_weights, 0, &job.token_weight_stride));
  job.out = pointer<void>(matrix(out, out_dtype, job.rows, job.vocab, true, &job.out_stride));
  job.out_dtype = static_cast<DType>(out_dtype);
  job.policy = policy;
  if (plain) run_job(job, steps);
  return plain;
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

  nb::class_<PolicyRule>(m, "PolicyRule")
      .def(
          "__init__",
          [](PolicyRule* self, float logprob_min, float advantage_low, float advantage_high, float ratio_low,
             float ratio_high, float clip_dual, float importance_cap) {
            new (self) PolicyRule{logprob_min, advantage_low, advantage_high, ratio_low,
                                  ratio_high,  clip_dual,     importance_cap};
          },
          nb::kw_only(), "logprob_min"_a, "advantage_low"_a, "advantage_high"_a, "ratio_low"_a, "ratio_high"_a,
          "clip_dual"_a, "importance_cap"_a);

  nb::class_<Policy>(m, "Policy")
      .def(
          "__init__",
          [](Policy* self, const PolicyRule& rule, double reward_scale, uintptr_t reward_scales, uintptr_t teacher,
             int64_t teacher_stride, uintptr_t ref, int64_t ref_stride, uintptr_t old_logprobs,
             uintptr_t rollout_logprobs) {
            new (self) Policy{rule,
                              reward_scale,
                              pointer<const float>(reward_scales),
                              {pointer<const float>(teacher), teacher_stride},
                              {pointer<const float>(ref), ref_stride},
                              pointer<const float>(old_logprobs),
                              pointer<const float>(rollout_logprobs)};
          },
          nb::kw_only(), "rule"_a, "reward_scale"_a, "reward_scales"_a, "teacher"_a, "teacher_stride"_a, "ref"_a,
          "ref_stride"_a, "old_logprobs"_a, "rollout_logprobs"_a);

  m.def(
      "policy",
      [](const Policy& policy, int64_t rows, uintptr_t statistics, int64_t statistics_stride, uintptr_t out,
         int64_t out_stride) {
        const TokenScores student{pointer<const float>(statistics), statistics_stride};
        chosen_kernels().policy(policy, student, rows, pointer<float>(out), out_stride);
        ++launch_count;
      },
      nb::kw_only(), "policy"_a, "rows"_a, "statistics"_a, "statistics_stride"_a, "out"_a, "out_stride"_a,
      "Write the five rows of PolicyStat of C tokens.");

  m.def(
      "losses",
      [](int divergence, double reward_scale, uintptr_t reward_scales, bool has_teacher, bool has_ref,
         float forward_weight, uintptr_t forward_weights, int64_t rows, uintptr_t statistics, int64_t statistics_stride,
         uintptr_t out) {
        const Losses losses{static_cast<Divergence>(divergence),
                            reward_scale,
                            pointer<const float>(reward_scales),
                            has_teacher,
                            has_ref,
                            forward_weight,
                            pointer<const float>(forward_weights),
                            pointer<const float>(statistics),
                            statistics_stride};
        chosen_kernels().losses(losses, rows, pointer<float>(out));
        ++launch_count;
      },
      nb::kw_only(), "divergence"_a, "reward_scale"_a, "reward_scales"_a, "has_teacher"_a, "has_ref"_a,
      "forward_weight"_a, "forward_weights"_a, "rows"_a, "statistics"_a, "statistics_stride"_a, "out"_a,
      "Write the token losses of C tokens. Arguments are the fields of Losses.");

  m.def(
      "add",
      [](const Model& model, int64_t rows, int64_t vocab, uintptr_t maximum, uintptr_t logsum, double weight,
         uintptr_t weights, double total_weight, uintptr_t total_weights, bool mixture, bool first, bool last,
         uintptr_t out, int64_t out_stride) {
        const Addition addition{rows,
                                vocab,
                                model,
                                pointer<const float>(maximum),
                                pointer<const float>(logsum),
                                weight,
                                pointer<const float>(weights),
                                total_weight,
                                pointer<const float>(total_weights),
                                mixture,
                                first,
                                last,
                                pointer<float>(out),
                                out_stride};
        const Kernels& kernels = chosen_kernels();
        nb::gil_scoped_release release;
        add(kernels, addition, parallel_for);
        ++launch_count;
      },
      nb::kw_only(), "model"_a, "rows"_a, "vocab"_a, "maximum"_a, "logsum"_a, "weight"_a, "weights"_a, "total_weight"_a,
      "total_weights"_a, "mixture"_a, "first"_a, "last"_a, "out"_a, "out_stride"_a,
      "Add the log-probs of one more model. Arguments are the fields of Addition.");

  m.def(
      "vector_address",
      [](nb::handle x, int dtype, int64_t rows, bool any_stride) {
        return plain_vector(x, dtype, rows, any_stride).address;
      },
      "x"_a, "dtype"_a, "rows"_a, "any_stride"_a = false,
      "The address of a (rows,) float32 (dtype 0) or int64 (3) tensor that needs no copy; 0 for any other.");
  m.def(
      "matrix_address",
      [](nb::handle x, int dtype, int64_t rows, int64_t columns, bool more_columns) {
        return plain_matrix(x, dtype, rows, columns, more_columns).address;
      },
      "x"_a, "dtype"_a, "rows"_a, "columns"_a, "more_columns"_a,
      "The address of a (rows, columns) tensor of unit stride whose rows do not overlap: statistics, or with more "
      "columns, at any address, logits; 0 for any other.");

  m.def(
      "set_parallel_for", [](uintptr_t address) { parallel_for = reinterpret_cast<ParallelFor>(address); }, "address"_a,
      "Share rows out over threads by the function at this address: a ParallelFor, or 0 for one thread.");

  m.attr("STATISTICS") = steps::statistics;
  m.attr("SECOND_ROUND") = steps::second_round;
  m.attr("GRADIENT") = steps::gradient;
  nb::class_<Job>(m, "Job").def(
      "__init__",
      [](Job* self, int64_t rows, int64_t vocab, const Model& student, const Model* teacher, const Model* ref,
         double reward_scale, int divergence, const std::vector<double>& constants, float forward_weight,
         bool stream_out) {
        Job job;
        job.rows = rows;
        job.vocab = vocab;
        job.student = student;
        if (teacher != nullptr) job.teacher = *teacher;
        if (ref != nullptr) job.ref = *ref;
        job.reward_scale = reward_scale;
        job.divergence = static_cast<Divergence>(divergence);
        set_constants(job, constants.data(), constants.size());
        job.forward_weight = forward_weight;
        job.stream_out = stream_out;
        new (self) Job(job);
      },
      nb::kw_only(), "rows"_a, "vocab"_a, "student"_a, "teacher"_a.none(), "ref"_a.none(), "reward_scale"_a,
      "divergence"_a, "constants"_a, "forward_weight"_a, "stream_out"_a, "What the chunks of a walk have in common.");
  m.def("run_plain", &run_plain, "job"_a, "steps"_a, "reward_scales"_a.none(), "forward_weights"_a.none(),
        "token_ids"_a.none(), "statistics"_a, "divergence_weights"_a.none(), "token_weights"_a.none(), "out"_a.none(),
        "out_dtype"_a, "policy"_a.none(),
        "The same as run on tensors; False, with nothing done, where one of them is not plain.");
  m.def(
      "run",
      [](Job job, int steps, uintptr_t reward_scales, uintptr_t forward_weights, uintptr_t token_ids,
         uintptr_t statistics, int64_t statistics_stride, uintptr_t divergence_weights,
         int64_t divergence_weight_stride, uintptr_t token_weights, int64_t token_weight_stride, uintptr_t out,
         int64_t out_stride, int out_dtype, const Policy* policy) {
        job.reward_scales = pointer<const float>(reward_scales);
        job.forward_weights = pointer<const float>(forward_weights);
        job.token_ids = pointer<const int64_t>(token_ids);
        job.statistics = pointer<float>(statistics);
        job.statistics_stride = statistics_stride;
        job.divergence_weights = pointer<const float>(divergence_weights);
        job.divergence_weight_stride = divergence_weight_stride;
        job.token_weights = pointer<const float>(token_weights);
        job.token_weight_stride = token_weight_stride;
        job.out = pointer<void>(out);
        job.out_stride = out_stride;
        job.out_dtype = static_cast<DType>(out_dtype);
        job.policy = policy;
        run_job(job, steps);
      },
      nb::kw_only(), "job"_a, "steps"_a, "reward_scales"_a, "forward_weights"_a, "token_ids"_a, "statistics"_a,
      "statistics_stride"_a, "divergence_weights"_a = 0, "divergence_weight_stride"_a = 0, "token_weights"_a = 0,
      "token_weight_stride"_a = 0, "out"_a = 0, "out_stride"_a = 0, "out_dtype"_a = 0, "policy"_a = nb::none(),
      "Compute the steps on a job, without the GIL. Arguments are the fields of Job.");
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
