// The row operations on one row of logits. Compiled once per instruction set (GOPD_ISA names it).
//
// For one row, over the support S (entries where no model that the row needs is -inf):
//
//   z, z_q, z_r   transformed logits of student, teacher, reference
//   z', q', r'    the same relative to their maxima over S
//   u             r' + lambda (q' - r'), or q' + (1 - lambda) (r' - q') for lambda > 1/2; in the finite range
//   u"            u relative to its origin: 0, or its maximum over S where that is far from 0
//   statistics    the maxima and the origin; log-sum-exp over S of z', q', r', u"; sum p z', sum p (z' - u);
//                 forward_kl, mixed: sum t (u" - z'); mixture, alpha: A = sum p h and the divergence itself;
//                 z', q', r' of the sampled token
//   gradient      g_v = w_d p_v (d_v - D) + w_y (p_v - 1[v = token]) on S, 0 elsewhere, times dz/dx
//
// with p = softmax(z'), t = softmax(u") and h, d, D as in fused_gopd/rowops/__init__.py.
//
// Traffic of one row with k models of b bytes an element: statistics read k b V bytes; mixture and alpha read them
// again; the gradient reads them again and writes its own V elements. One row of 152k float32 is 0.6 MB, so with both
// halves in one call the second read comes from the cache.
//
// A row is walked in blocks that fit the first-level cache. A block is brought to float32 z, z_q, z_r first (or read in
// place where it already is that), padded to whole vectors with -inf, which is outside S by itself.

#include "losses.h"
#include "policy.h"
#include "rowops.h"
#include "vec.h"

namespace fused_gopd {
namespace GOPD_ISA {
namespace {

// Elements of a block: at most three float32 blocks of logits and one of gradients are in use at once, 16 KiB.
constexpr int kBlock = 1024;

// The maxima are known only at the end of the row. Until then x', relative to the maximum, is stood in for by x~,
// relative to a shift near the largest logit seen so far. A block with an x~ above this is done again with a new shift;
// in a row of normal logits few are. It bounds the rounding of x~ at 2^-22 for the terms that matter.
constexpr float kHeadroom = 8.0f;

// u~ = r~ + lambda (q~ - r~) needs a shift of its own only where it is far from 0: above kHeadroom, or so far below
// that exp(u~) would leave the normal numbers for terms that matter.
constexpr float kFarBelow = -50.0f;

// FAR of fused_gopd/rowops/__init__.py: where the maximum of u is further from 0, that is its origin.
constexpr float kFar = 64.0f;

// Sums of a logit difference times an exponential are taken of this share of it where it may be near the largest float:
// a block's sum stays finite.
constexpr float kShare = 0x1p-24f;

// How far ahead of a loop its logits are fetched, in elements. The processor's own prefetching stops at the end of a
// page, which is the end of a block, too. Where a block is made first, the arithmetic on it fetches the next one:
// making it is too short to wait for memory.
// On Sapphire Rapids 512 beat 1024 and 2048; on Zen 5 768 is 3 % and 1024 5 % faster than 512.
constexpr int kPrefetch = 768;

// A hot loop in a function of its own: inlined into a row's, its constants compete for registers with the rest.
#define GOPD_HOT __attribute__((noinline))

inline int padded(int n) { return (n + W - 1) / W * W; }

// ---------------------------------------------------------------------------------------------------------- loading

GOPD_INLINE inline vf transform(const Model& model, vf x) {
  const vf y = x * model.input_scale;
  if (!model.softcap) return y;
  return select(y == -kInf, y, tanh(y) * model.output_scale);
}

inline const void* entry_address(const Model& model, int64_t row, int64_t entry) {
  return static_cast<const char*>(model.raw) + (row * model.row_stride + entry) * (model.dtype == DType::f32 ? 4 : 2);
}

// Whether z is x.
inline bool identity(const Model& model) {
  return !model.softcap && model.bias == nullptr && model.input_scale == 1.0f;
}

template <DType D>
const float* load_block_as(const Model& model, int64_t row, int64_t start, int n, float* buffer) {
  typedef typename Storage<D>::type T;
  const T* x = static_cast<const T*>(entry_address(model, row, start));
  const bool plain = identity(model);
  if constexpr (D == DType::f32) {
    if (plain && n % W == 0) return x;
  }
  const float* bias = model.bias == nullptr ? nullptr : model.bias + start;
  const int whole = n / W * W;
  if (plain) {
    for (int k = 0; k < whole; k += W) {
      store(buffer + k, widen<D>(x + k));
    }
  } else {
    for (int k = 0; k < whole; k += W) {
      vf v = widen<D>(x + k);
      if (bias != nullptr) v += load(bias + k);
      store(buffer + k, transform(model, v));
    }
  }
  if (whole < n) {
    T tail[W] = {};
    float tail_bias[W] = {};
    memcpy(tail, x + whole, (n - whole) * sizeof(T));
    if (bias != nullptr) memcpy(tail_bias, bias + whole, (n - whole) * sizeof(float));
    store(buffer + whole, transform(model, widen<D>(tail) + load(tail_bias)));
    for (int k = n; k < whole + W; ++k) buffer[k] = -kInf;
  }
  return buffer;
}

// z of entries start .. start + n of a row: padded(n) floats in buffer or, where nothing has to change, in place.
const float* load_block(const Model& model, int64_t row, int64_t start, int n, float* buffer) {
  switch (model.dtype) {
    case DType::bf16:
      return load_block_as<DType::bf16>(model, row, start, n, buffer);
    case DType::f16:
      return load_block_as<DType::f16>(model, row, start, n, buffer);
    default:
      return load_block_as<DType::f32>(model, row, start, n, buffer);
  }
}

// The same number, and of all NaN one that stays one in narrow_run().
inline float canonical(float x) { return x == x ? x : __builtin_nanf(""); }

// One row, and which models it needs: model[0] is the student; then the teacher unless lambda = 0 and the reference
// unless lambda = 1. With one of them u is its logits, with both u has to be computed: as that of the last model and
// ``share`` times the difference to it. The last one is the reference for lambda <= 1/2, the teacher otherwise: the
// rounding of the difference, a large one where one of them is a large mask, counts the less.
struct Row {
  const Job& job;
  int64_t index;
  int count = 0;
  const Model* model[3];
  int kind[3];  // 0 student, 1 teacher, 2 reference: what to add to a student's Stat
  float share;

  Row(const Job& job, int64_t index) : job(job), index(index) {
    const double lambda = job.reward_scales != nullptr ? job.reward_scales[index] : job.reward_scale;
    const bool near_teacher = lambda > 0.5;
    share = canonical(float(near_teacher ? 1.0 - lambda : lambda));
    add(job.student, 0);
    if (near_teacher) add_reference(lambda);
    if (job.teacher.raw != nullptr && lambda != 0.0) add(job.teacher, 1);
    if (!near_teacher) add_reference(lambda);
  }
  void add_reference(double lambda) {
    if (job.ref.raw != nullptr && lambda != 1.0) add(job.ref, 2);
  }
  void add(const Model& m, int which) {
    model[count] = &m;
    kind[count++] = which;
  }
  // The dtype of the logits where the row's models have one and z is x: its 16-bit numbers are widened as they are
  // used. float32 otherwise: blocks of z are made first.
  DType read_as() const {
    for (int i = 0; i < count; ++i) {
      if (model[i]->dtype != model[0]->dtype || !identity(*model[i])) return DType::f32;
    }
    return model[0]->dtype;
  }
  float& statistic(int stat) const { return job.statistics[stat * job.statistics_stride + index]; }
};

inline vf mix(vf other, vf last, float share) { return last + share * (other - last); }

// Within the finite range; NaN stays.
inline vf bounded(vf x, float limit = kMaxFloat) { return max(splat(-limit), min(splat(limit), x)); }

// u" of u; never above the origin but for rounding.
inline vf relative(vf u, float origin) { return max(splat(-kMaxFloat), min(splat(kMaxFloat), u) - origin); }

// A log-probability of the target. Relative to maxima of more columns a large mask rounds to another number than the
// log-sum over these columns had, and the difference may be above 0. So does the largest u of two models, in any row.
inline vf at_most_one(vf log_t) { return min(vf{}, log_t); }

// action(As<D>()) with the D of row.read_as().
template <DType D>
struct As {
  static constexpr DType dtype = D;
};
template <class Action>
auto with_dtype(const Row& row, Action action) {
  const DType dtype = row.read_as();
  if (dtype == DType::bf16) return action(As<DType::bf16>());
  if (dtype == DType::f16) return action(As<DType::f16>());
  return action(As<DType::f32>());
}

// What a hot loop reads of every model the row needs: z, as it is stored.
template <DType D>
struct Entries {
  const typename Storage<D>::type* x[3];  // the student's, then the others'
  const void* next[3];                    // what to fetch meanwhile: the logits that are needed next
  float share;

  template <int I>
  vf read(int model, int k) const {
    return widen_run<D, I>(x[model] + k);
  }
  // The address to fetch at k.
  const void* ahead(int model, int k) const { return static_cast<const char*>(next[model]) + k * sizeof *x[0]; }
};

// z of a block as float32, in the buffers or where the logits are.
struct Block : Entries<DType::f32> {
  alignas(64) float buffer[3][kBlock];

  template <int Models>
  void load(const Row& row, int64_t start, int n) {
    share = row.share;
    for (int i = 0; i < Models; ++i) {
      x[i] = load_block(*row.model[i], row.index, start, n, buffer[i]);
      // as many bytes as the block has in float32: of 16 bits these are the logits of this block and of the next one
      const int ahead = x[i] != buffer[i] ? kPrefetch : row.model[i]->dtype == DType::f32 ? kBlock : 0;
      next[i] = entry_address(*row.model[i], row.index, start + ahead);
    }
  }
};

// From start on, where the logits are; D is row.read_as().
template <int Models, DType D>
Entries<D> raw_entries(const Row& row, int64_t start) {
  Entries<D> found;
  found.share = row.share;
  for (int i = 0; i < Models; ++i) {
    typedef typename Storage<D>::type T;
    found.x[i] = static_cast<const T*>(entry_address(*row.model[i], row.index, start));
    found.next[i] = found.x[i] + kPrefetch;
  }
  return found;
}

// u at vector I of the run at k, from logits relative to origins: the maxima, or shifts that stand in for them.
template <int Models, int I = 0, DType D>
GOPD_INLINE inline vf target_logits(const Entries<D>& b, int k, const float* origin) {
  const vf q = b.template read<I>(1, k) - origin[1];
  if constexpr (Models == 2) return q;
  return mix(q, b.template read<I>(Models - 1, k) - origin[Models - 1], b.share);
}

template <int Models, int I = 0, DType D>
GOPD_INLINE inline vi support(const Entries<D>& b, int k) {
  vi inside = b.template read<I>(0, k) != -kInf;
  for (int i = 1; i < Models; ++i) inside &= b.template read<I>(i, k) != -kInf;
  return inside;
}

// ------------------------------------------------------------------------------------------------------- statistics

// As a float, the largest one where x is beyond it.
inline float finite(double x) { return x > kMaxFloat ? kMaxFloat : x < -kMaxFloat ? -kMaxFloat : float(x); }

// What one pass over a block gives. Series 0 .. Models - 1 are the models'; with three models a fourth is u's, which is
// the second model's otherwise.
template <int Models>
constexpr int kSeries = Models == 3 ? 4 : Models;

struct BlockSums {
  float sum[4];           // sum of e = exp(x~), and of e_u = exp(u~ - its shift)
  float mean;             // of e z~ for the student
  float gap, target_gap;  // of e (z~ - u~) for the student, of e_u (u~ - z~)
  float top[4];           // unmasked: the largest x and u~, NaN left aside
  bool beyond;            // masked: whether a u~ would have been infinite (or is NaN)
};

// Unmasked: any block; what it gives is of use if nothing is far above its shift and mean and gap are finite: they are
// not if a logit is -inf, since that is multiplied by its own exponential, 0, there or enters u~.
// Masked: entries outside S are -inf in all models; the two gaps are kShare of what they are.
template <int Models, bool TargetGap, bool Masked, DType D>
GOPD_HOT BlockSums sum_block(const Entries<D>& b, int n, const float* shift, float u_shift) {
  vf sum[4] = {}, mean = {}, gap = {}, target_gap = {}, top[4];
  vi beyond = {};
  for (int i = 0; i < kSeries<Models>; ++i) top[i] = splat(-kInf);
  for (int k = 0; k < n; k += kRun<D>) {
    for (int i = 0; i < Models; ++i) __builtin_prefetch(b.ahead(i, k));
    each_vector<D>([&](auto of) GOPD_INLINE {
      constexpr int I = decltype(of)::value;
      const vf raw = b.template read<I>(0, k);
      const vi inside = raw != -kInf;
      vf z = raw - shift[0];
      if (Masked) z = max(splat(-kMaxFloat), z);
      const Exponential exp_z = exponential<Masked>(z);
      const vf e = exp_z.value();
      sum[0] = exp_z.plus(sum[0]);
      mean += Masked ? select(inside, e * z, vf{}) : e * z;
      if (!Masked) top[0] = max(raw, top[0]);
      if constexpr (Models > 1) {
        const vf raw_1 = b.template read<I>(1, k);
        vf u = raw_1 - shift[1];
        if (Masked) u = max(splat(-kMaxFloat), u);
        Exponential exp_u = exponential<Masked>(u);
        sum[1] = exp_u.plus(sum[1]);
        if (!Masked) top[1] = max(raw_1, top[1]);
        if constexpr (Models == 3) {
          const vf raw_2 = b.template read<I>(2, k);
          vf r = raw_2 - shift[2];
          if (Masked) r = max(splat(-kMaxFloat), r);
          sum[2] = exponential<Masked>(r).plus(sum[2]);
          u = mix(u, r, b.share);
          if (Masked) {
            const vi within = abs(u) <= kMaxFloat;
            beyond |= inside & ~within;
            u = bounded(u);
          }
          const vf shifted = (Masked ? select(inside, u, splat(-kInf)) : u) - u_shift;
          exp_u = exponential<Masked>(shifted);
          sum[3] = exp_u.plus(sum[3]);
          if (!Masked) {
            top[2] = max(raw_2, top[2]);
            top[3] = max(u, top[3]);
          }
        }
        // of logits near the largest float the share, which cannot overflow
        const vf difference = Masked ? z * kShare - u * kShare : z - u;
        gap += Masked ? select(inside, e * difference, vf{}) : e * difference;
        if constexpr (TargetGap) {
          const vf term = exp_u.value() * difference;
          target_gap -= Masked ? select(inside, term, vf{}) : term;
        }
      }
    });
  }
  BlockSums s = {};
  for (int i = 0; i < kSeries<Models>; ++i) {
    s.sum[i] = sum_lanes(sum[i]);
    if (!Masked) s.top[i] = max_lanes(top[i]);
  }
  s.mean = sum_lanes(mean);
  for (int i = 0; Masked && i < W; ++i) s.beyond = s.beyond || beyond[i] != 0;
  if (Models > 1) s.gap = sum_lanes(gap);
  if (TargetGap) s.target_gap = sum_lanes(target_gap);
  return s;
}

GOPD_HOT float max_block(const float* x, int n) {
  vf top = splat(-kInf);
  for (int k = 0; k < n; k += W) top = max(load(x + k), top);
  return max_lanes(top);
}

// Largest u~ of a block; of a masked one over S.
float max_target(const Block& b, int n, const float* shift) {
  vf top = splat(-kInf);
  for (int k = 0; k < n; k += W) {
    const vf u = bounded(target_logits<3>(b, k, shift));
    top = max(select(load(b.x[0] + k) != -kInf, u, splat(-kInf)), top);
  }
  return max_lanes(top);
}

// How the sums of a row ended.
struct Finished {
  bool far = false;     // the maximum of u is far from 0
  bool bounded = true;  // no z' or u is infinite, nor a difference of two logit differences
};

// The running sums of a row.
template <int Models>
struct RowSums {
  float top[4] = {-kInf, -kInf, -kInf, -kInf};  // largest x so far (u~ for u), NaN left aside: it shows in the sums
  float shift[4] = {};
  double sum[4] = {}, mean = 0.0, gap = 0.0, target_gap = 0.0;
  double share;
  bool beyond = false;  // whether a u would have been infinite

  explicit RowSums(float share) : share(share) {}

  // What happens to u where this happens to the models' x; exact for equal models.
  double mix(const double* x) const {
    if constexpr (Models == 1) return 0.0;
    return Models == 2 ? x[1] : x[2] + share * (x[1] - x[2]);
  }

  void add(const BlockSums& s, double share_of_gaps = 1.0) {
    for (int i = 0; i < kSeries<Models>; ++i) sum[i] += s.sum[i];
    mean += s.mean;
    gap += s.gap / share_of_gaps;
    target_gap += s.target_gap / share_of_gaps;
    beyond = beyond || s.beyond;
  }

  // A block as it is. False, and nothing added, if it has to be masked or a shift is too low.
  template <bool TargetGap, DType D>
  bool add_block(const Entries<D>& b, int n) {
    const BlockSums s = sum_block<Models, TargetGap, false>(b, n, shift, shift[3]);
    if (!__builtin_isfinite(s.mean) || !__builtin_isfinite(s.gap)) return false;
    for (int i = 0; i < kSeries<Models>; ++i) {
      if (!(s.top[i] - shift[i] <= kHeadroom)) return false;
    }
    for (int i = 0; i < kSeries<Models>; ++i) top[i] = s.top[i] > top[i] ? s.top[i] : top[i];
    add(s);
    return true;
  }

  // A masked block, after raising the shifts to its largest logits where those are the largest so far.
  template <bool TargetGap>
  void add_masked_block(const Block& b, int n) {
    double moved[3] = {};
    for (int i = 0; i < Models; ++i) {
      const float block_top = max_block(b.x[i], n);
      if (!(block_top > top[i])) continue;
      const float raised = block_top < kMaxFloat ? block_top : kMaxFloat;  // exp(x~): inf for +inf, 0 for the others
      if (top[i] != -kInf) moved[i] = double(shift[i]) - double(raised);
      top[i] = block_top;
      shift[i] = raised;
    }
    const double u_moved = mix(moved);
    double exponent_moved = Models == 1 ? 0.0 : moved[1];
    if constexpr (Models == 3) {
      const float block_top = max_target(b, n, shift), before = float(top[3] + u_moved), old_shift = shift[3];
      top[3] = block_top > before ? block_top : before;
      const float above = top[3] - old_shift;
      const bool far = above > kHeadroom || above < kFarBelow;
      if (far && top[3] >= -kMaxFloat && top[3] <= kMaxFloat) shift[3] = top[3];
      exponent_moved = u_moved + (double(old_shift) - double(shift[3]));
    }
    if (moved[0] != 0.0 || u_moved != 0.0 || exponent_moved != 0.0) {
      const double student = __builtin_exp(moved[0]), target = __builtin_exp(exponent_moved);
      mean = student * (mean + moved[0] * sum[0]);
      gap = student * (gap + (moved[0] - u_moved) * sum[0]);
      target_gap = target * (target_gap + (u_moved - moved[0]) * sum[kSeries<Models> - 1]);
      for (int i = 0; i < Models; ++i) sum[i] *= __builtin_exp(moved[i]);
      if (Models == 3) sum[3] *= target;
    }
    add(sum_block<Models, TargetGap, true, DType::f32>(b, n, shift, shift[3]), kShare);
  }

  // From shifts to maxima, and out.
  template <bool TargetGap>
  Finished finish(const Row& row) const {
    Finished finished;
    const bool empty = sum[0] == 0.0;
    const float undefined = __builtin_nanf("");
    bool poisoned = false, u_poisoned = false;  // NaN or +inf in any model; in teacher or reference
    double below[3];                            // x' - x~
    for (int i = 0; i < Models; ++i) {
      const bool bad = !__builtin_isfinite(sum[i]);
      poisoned = poisoned || bad;
      u_poisoned = u_poisoned || (bad && i > 0);
      below[i] = empty ? 0.0 : double(shift[i]) - double(top[i]);
      const float value = float(below[i] + __builtin_log(sum[i]));
      // not below 0, the largest logit, whatever the rounding: log-probabilities are never positive
      row.statistic(logsum_student + row.kind[i]) = bad ? undefined : empty ? -kInf : value < 0.0f ? 0.0f : value;
      row.statistic(max_student + row.kind[i]) = __builtin_isnan(sum[i]) ? undefined : empty ? 0.0f : top[i];
      finished.bounded = finished.bounded && top[i] < 1e30f;  // a mask is as far below it as it is below 0
    }
    const double mean_z = empty ? 0.0 : below[0] + mean / sum[0];
    row.statistic(mean_logit) = __builtin_isfinite(sum[0]) ? float(mean_z) : undefined;
    if constexpr (Models > 1) {
      constexpr int target = kSeries<Models> - 1;
      const double u_below = mix(below);
      const double mean_difference = empty ? 0.0 : (below[0] - u_below) + gap / sum[0];
      row.statistic(mean_gap) = poisoned ? undefined : finite(mean_difference);
      finished.bounded = finished.bounded && !beyond && __builtin_fabs(mean_difference) < 1e30;
      if constexpr (TargetGap) {
        const double target_mean = empty ? 0.0 : (u_below - below[0]) + target_gap / sum[target];
        row.statistic(divergence_value) = poisoned ? undefined : finite(target_mean);
      }
      float value = row.statistic(logsum_student + row.kind[1]);
      if constexpr (Models == 3) {
        value = float((u_below + double(shift[3])) + __builtin_log(sum[3]));
        // the target is the student: the same bits, to the last rounding
        if (sum[3] == sum[0] && shift[3] == 0.0f && u_below == below[0]) value = row.statistic(logsum_student);
        finished.far = !poisoned && !empty && !(__builtin_fabs(top[3] + u_below) <= kFar);
      }
      const bool bad = u_poisoned || !__builtin_isfinite(sum[target]);
      row.statistic(logsum_target) = bad ? undefined : empty ? -kInf : value;
    }
    return finished;
  }
};

// The statistics of a target whose maximum is far from 0, relative to that, from u as the gradient forms it: of shifted
// logits it would be another number, by the rounding of what is far away.
template <bool TargetGap>
void far_target(const Row& row) {
  float maximum[3];
  for (int i = 0; i < 3; ++i) maximum[i] = row.statistic(max_student + row.kind[i]);
  float top = -kInf;
  double sum = 0.0, gap = 0.0;
  Block b;
  for (int pass = 0; pass < 2; ++pass) {
    const bool find_maximum = pass == 0;
    for (int64_t start = 0; start < row.job.vocab; start += kBlock) {
      const int n = row.job.vocab - start < kBlock ? int(row.job.vocab - start) : kBlock;
      b.load<3>(row, start, n);
      vf tops = splat(-kInf), sums = {}, gaps = {};
      for (int k = 0; k < padded(n); k += W) {
        const vi inside = support<3>(b, k);
        const vf z = max(splat(-kMaxFloat), load(b.x[0] + k) - maximum[0]);
        const vf u = target_logits<3>(b, k, maximum);
        if (find_maximum) {
          tops = max(select(inside, bounded(u), splat(-kInf)), tops);
        } else {
          const vf below = relative(u, top);
          const vf e = keep(inside, exp(below));
          sums += e;
          gaps += select(inside, e * (below * kShare - z * kShare), vf{});
        }
      }
      if (find_maximum) top = top > max_lanes(tops) ? top : max_lanes(tops);
      sum += sum_lanes(sums);
      gap += sum_lanes(gaps) / double(kShare);
    }
  }
  row.statistic(origin_target) = top;
  row.statistic(logsum_target) = float(__builtin_log(sum));
  if (TargetGap) row.statistic(divergence_value) = finite(gap / sum);
}

// Replace entries outside S by -inf in all models, in the block's buffers. Returns how many there are.
template <int Models>
int mask_block(Block& b, int n) {
  vi outside = {};
  for (int k = 0; k < n; k += W) {
    const vi inside = support<Models>(b, k);
    outside += inside + 1;
    for (int i = 0; i < Models; ++i) store(b.buffer[i] + k, select(inside, load(b.x[i] + k), splat(-kInf)));
  }
  for (int i = 0; i < Models; ++i) b.x[i] = b.buffer[i];
  int total = 0;
  for (int i = 0; i < W; ++i) total += outside[i];
  return total;
}

// All statistics that need one pass. Returns whether all V entries of the row are in S and the gradient's arithmetic
// needs no care but for weights above 1: the origin of u is 0, and nothing in it overflows.
template <int Models, bool TargetGap, DType D>
bool first_statistics(const Row& row) {
  RowSums<Models> sums(row.share);
  Block b;
  bool clean = true, careful = true;
  for (int64_t start = 0; start < row.job.vocab; start += kBlock) {
    const int n = row.job.vocab - start < kBlock ? int(row.job.vocab - start) : kBlock;
    const int lanes = padded(n);
    if constexpr (D != DType::f32) {
      if (!careful && n % kRun<D> == 0 && sums.template add_block<TargetGap>(raw_entries<Models, D>(row, start), n))
        continue;
    }
    b.load<Models>(row, start, n);
    if constexpr (D == DType::f32) {
      if (!careful && lanes == n && sums.template add_block<TargetGap, D>(b, n)) continue;
    }
    careful = mask_block<Models>(b, lanes) != lanes - n;
    clean = clean && !careful;
    sums.template add_masked_block<TargetGap>(b, lanes);
  }
  const Finished finished = sums.template finish<TargetGap>(row);
  if constexpr (Models == 3) {
    if (finished.far) far_target<TargetGap>(row);
  }
  return clean && finished.bounded && !finished.far;
}

// The formula of a row's second round and of its gradient. token: the divergence's weight is 0, its term is left out.
// jsd, jsd_near_end: a mixture with kappa = 0, whose t / m - 1 is not computed.
enum class Term { token, none, reverse_kl, forward_kl, mixed, jsd, jsd_near_end, mixture, alpha };

template <Term T>
struct Of {
  static constexpr Term term = T;
};

// action(Of<T>()) with the job's T.
template <class Action>
void with_term(const Job& job, Action action) {
  switch (job.divergence) {
    case Divergence::none:
      return action(Of<Term::none>());
    case Divergence::reverse_kl:
      return action(Of<Term::reverse_kl>());
    case Divergence::forward_kl:
      return action(Of<Term::forward_kl>());
    case Divergence::mixed:
      return action(Of<Term::mixed>());
    case Divergence::alpha:
      return action(Of<Term::alpha>());
    case Divergence::mixture:
      if (job.mixture.kappa != 0.0f) return action(Of<Term::mixture>());
      return job.mixture.near_end ? action(Of<Term::jsd_near_end>()) : action(Of<Term::jsd>());
  }
}

// log p - log m and log t - log m at delta = log t - log p, and t / m - 1 for Term::mixture. In terms of delta alone,
// they are exactly 0 where the models agree, and no probability is formed that could underflow:
//   log m - log p = log(1 - b + b e^delta) = max(delta, 0) + log(1 + B (e^-|delta| - 1)),
//   with B = b for delta < 0 and 1 - b for delta > 0.
// Near an end of b the same with the turn of the mixture in place of 0, and the logarithm as log1p.
template <Term T>
GOPD_INLINE inline void log_ratios(vf delta, const Mixture& m, vf& student, vf& target, vf& excess) {
  if constexpr (T == Term::jsd) {
    const vf e = exp(bits<vf>(bits<vi>(delta) | splat_int(INT32_MIN)));
    const vf b = select(delta > 0.0f, splat(m.one_minus_b), splat(m.b));
    const vf common = log(b * (e - 1.0f) + 1.0f);
    student = -max(vf{}, delta) - common;
    target = min(vf{}, delta) - common;
  } else {
    const vi above = delta > m.turn, sign = above & splat_int(INT32_MIN);
    const vf e = exp(bits<vf>(bits<vi>(delta) ^ sign));
    const vf b = select(above, splat(m.one_minus_b), splat(m.b));
    const vf rest = select(above, splat(m.b), splat(m.one_minus_b));
    const vf mixed = b * e + rest;  // not below rest, where 1 + b (e - 1) would round to 0
    const vf common = log(mixed) + (b * (e - 1.0f) - (mixed - 1.0f));
    student = -keep(above, delta) - common;
    target = keep(~above, delta) - common;
    if constexpr (T == Term::mixture) excess = bits<vf>(bits<vi>((e - 1.0f) * m.one_minus_b) ^ sign) / mixed;
  }
}

// What a pass over a row that knows its statistics needs of them, and the gradient's weights w_d and w_y.
struct Coefficients {
  float divergence = 0.0f, token = 0.0f;
  float forward = 0.0f;  // Term::mixed: the part of w_d for the forward KL, the rest is in divergence
  float maximum[3], logsum_p, logsum_u, origin, mean = 0.0f;
  Mixture mixture;
  float limit = kMaxFloat;                                 // the largest |d| for which w_d d is finite
  float rate = 0.0f, inverse_rate = 0.0f, largest = 0.0f;  // Term::alpha: see power_difference

  explicit Coefficients(const Row& row) : mixture(row.job.mixture) {
    for (int i = 0; i < row.count; ++i) maximum[i] = canonical(row.statistic(max_student + row.kind[i]));
    logsum_p = canonical(row.statistic(logsum_student));
    logsum_u = canonical(row.statistic(logsum_target));
    origin = canonical(row.statistic(origin_target));
  }
  void set_rate(double to) {
    const double inverse = 1.0 / to, size = __builtin_fabs(inverse);
    rate = float(to);
    inverse_rate = size < 1e30 ? float(inverse) : to < 0.0 ? -1e30f : 1e30f;
    largest = size > 1.0 ? float(80.0 - __builtin_log(size < 1e30 ? size : 1e30)) : 80.0f;
  }
};

// x (e^(rate delta) - 1) / rate of x = exp(log_x): a polynomial where rate delta is small, the difference of two
// exponentials elsewhere. Clamped to e^80, so that the sum of a block is finite.
GOPD_INLINE inline vf power_difference(vf x, vf log_x, vf delta, const Coefficients& c) {
  const vf y = c.rate * delta;
  vf p = splat(1.387575059e-3f);  // minimax for |y| <= 1/2, to 1.2e-7 of the result
  p = p * y + 8.402393199e-3f;
  p = p * y + 4.166897014e-2f;
  p = p * y + 1.666613519e-1f;
  p = p * y + 4.999998212e-1f;
  p = p * y + 1.0f;
  const vf far = (exp(min(splat(c.largest), log_x + y)) - x) * c.inverse_rate;
  return select(abs(y) < 0.5f, x * delta * p, far);
}

// The sums of the second round over a block, from the row's normalisers. Clean as in gradient_block.
//   alpha           p (e^(alpha delta) - 1) / alpha, or for alpha > 1/2 t (e^((alpha - 1) delta) - 1) / (alpha - 1)
//   jsd, mixture    p log p/m, t log t/m and, for mixture, p (t/m - 1)
template <Term T>
constexpr int kSecondSums = T == Term::alpha ? 1 : 2 + (T == Term::mixture);

template <int Models, Term T, bool Clean, DType D>
GOPD_HOT void second_block(const Entries<D>& b, int n, const Coefficients& c, bool of_target, double* total) {
  vf sum[3] = {};
  for (int k = 0; k < n; k += kRun<D>) {
    each_vector<D>([&](auto of) GOPD_INLINE {
      constexpr int I = decltype(of)::value;
      const vf log_p = (b.template read<I>(0, k) - c.maximum[0]) - c.logsum_p;
      vf u = target_logits<Models, I>(b, k, c.maximum);
      if constexpr (Models == 3 && !Clean) u = relative(u, c.origin);
      vf log_t = u - c.logsum_u;
      if (!Clean || Models == 3) log_t = at_most_one(log_t);
      vf term[3];
      if constexpr (T == Term::alpha) {
        const vf log_x = of_target ? log_t : log_p;
        term[0] = power_difference(exp(log_x), log_x, log_t - log_p, c);
      } else {
        log_ratios<T>(log_t - log_p, c.mixture, term[0], term[1], term[2]);
        const vf p = exp(log_p);
        term[0] *= p;
        term[1] *= exp(log_t);
        if (T == Term::mixture) term[2] *= p;
      }
      const vi inside = support<Models, I>(b, k);
      for (int i = 0; i < kSecondSums<T>; ++i) sum[i] += Clean ? term[i] : select(inside, term[i], vf{});
    });
  }
  for (int i = 0; i < kSecondSums<T>; ++i) total[i] += sum_lanes(sum[i]);
}

template <int Models, Term T, DType D>
void second_sums(const Row& row, bool clean) {
  const double alpha = row.job.alpha;
  const bool of_target = T == Term::alpha && alpha > 0.5;
  Coefficients c(row);
  if (T == Term::alpha) c.set_rate(of_target ? alpha - 1.0 : alpha);
  double total[3] = {};
  Block b;
  for (int64_t start = 0; start < row.job.vocab; start += kBlock) {
    const int n = row.job.vocab - start < kBlock ? int(row.job.vocab - start) : kBlock;
    const int lanes = padded(n);
    if constexpr (D != DType::f32) {
      if (clean && n % kRun<D> == 0) {
        second_block<Models, T, true>(raw_entries<Models, D>(row, start), n, c, of_target, total);
        continue;
      }
    }
    b.load<Models>(row, start, n);
    clean&& lanes == n ? second_block<Models, T, true, DType::f32>(b, n, c, of_target, total)
                       : second_block<Models, T, false, DType::f32>(b, lanes, c, of_target, total);
  }
  const Mixture& m = c.mixture;
  double a = m.c_p * total[0] + m.kappa * total[2], l = m.c_t * total[1] + m.c_p * total[0];
  if (T == Term::alpha) {
    // the two are sum t^alpha p^(1 - alpha) - 1, over -alpha and over alpha (alpha - 1)
    l = of_target ? total[0] / alpha : total[0] / (alpha - 1.0);
    a = (1.0 - alpha) * l;
  }
  row.statistic(centre) = finite(a);
  row.statistic(divergence_value) = finite(l);
}

template <int Models>
void second_round(const Row& row, bool clean) {
  with_term(row.job, [&](auto of) {
    constexpr Term T = decltype(of)::term;
    if constexpr (Models > 1 && T >= Term::jsd) {
      with_dtype(row, [&](auto as) { second_sums<Models, T, decltype(as)::dtype>(row, clean); });
    }
  });
}

// The logits of the sampled token.
struct Token {
  bool exists = false;  // an id inside [0, V)
  bool inside = false;  // in S
  float x[3] = {};

  explicit Token(const Row& row) {
    const int64_t id = row.job.token_ids[row.index];
    exists = inside = id >= 0 && id < row.job.vocab;
    for (int i = 0; exists && i < row.count; ++i) {
      float buffer[W];
      x[i] = *load_block(*row.model[i], row.index, id, 1, buffer);
      inside = inside && x[i] != -kInf;
    }
  }
};

template <int Models>
bool statistics(const Row& row) {
  for (int stat = 0; stat < stat_count; ++stat) row.statistic(stat) = 0.0f;
  const bool target_gap = row.job.divergence == Divergence::forward_kl || row.job.divergence == Divergence::mixed;
  const bool clean = with_dtype(row, [&](auto as) {
    constexpr DType D = decltype(as)::dtype;
    return Models > 1 && target_gap ? first_statistics<Models, (Models > 1), D>(row)
                                    : first_statistics<Models, false, D>(row);
  });
  second_round<Models>(row, clean);
  if (row.job.token_ids != nullptr) {
    const Token token(row);
    for (int i = 0; i < Models; ++i) {
      const float value = (token.inside ? token.x[i] : -kInf) - row.statistic(max_student + row.kind[i]);
      row.statistic(logit_student + row.kind[i]) = token.exists ? value : __builtin_nanf("");
    }
  }
  return clean;
}

// --------------------------------------------------------------------------------------------------------- gradient

// w_d p (d - D) + w_y p for the first n entries of a block; 0 outside S, unless Clean promises that there is no
// outside, that the origin of u is 0 and that nothing overflows. Stream: g is float32, aligned to the vector and stored
// to past the caches. Passed by value, b and c are not read again after each store to g.
template <int Models, Term T, bool Clean, bool Stream = false, DType D>
GOPD_HOT void gradient_block(Entries<D> b, int n, Coefficients c, typename Storage<D>::type* g) {
  const float student_weight = c.divergence * c.mixture.c_p, excess_weight = c.divergence * c.mixture.kappa;
  const float limit = c.limit, everywhere = finite(double(c.token) - double(c.divergence) * double(c.mean));
  for (int k = 0; k < n; k += kRun<D>) {
    for (int i = 0; i < Models; ++i) __builtin_prefetch(b.ahead(i, k));
    vf run[kVectors<D>];
    each_vector<D>([&](auto of) GOPD_INLINE {
      constexpr int I = decltype(of)::value;
      const vf z = b.template read<I>(0, k) - c.maximum[0];
      const vf log_p = z - c.logsum_p;
      const vf p = exp(log_p);
      vf u = {}, value;
      if constexpr (Models > 1) u = target_logits<Models, I>(b, k, c.maximum);
      if constexpr (T == Term::token) value = c.token * p;
      // a mask of the smallest float times a weight above 1 is infinite, its p is 0
      if constexpr (T == Term::none) value = c.divergence * (p * (z - c.mean)) + c.token * p;
      if constexpr (T == Term::reverse_kl || T == Term::mixed) {
        vf d = (z - u) - c.mean;
        if (!Clean) d = bounded(d, limit);
        value = p * (c.divergence * d + c.token);
      }
      if constexpr (Models == 3 && !Clean && T != Term::reverse_kl) u = relative(u, c.origin);
      const vf log_t = Clean && Models < 3 ? u - c.logsum_u : at_most_one(u - c.logsum_u);
      if constexpr (T == Term::forward_kl) value = c.divergence * (p - exp(log_t)) + c.token * p;
      if constexpr (T == Term::mixed) value += c.forward * (p - exp(log_t));
      if constexpr (T == Term::jsd || T == Term::jsd_near_end || T == Term::mixture) {
        vf student, target, excess;
        log_ratios<T>(log_t - log_p, c.mixture, student, target, excess);
        value = student_weight * (p * student) + everywhere * p;
        if constexpr (T == Term::mixture) value += excess_weight * (p * excess);
      }
      if constexpr (T == Term::alpha) {
        value = everywhere * p - c.divergence * power_difference(p, log_p, log_t - log_p, c);
      }
      run[I] = Clean ? value : keep(support<Models, I>(b, k), value);
    });
    if constexpr (Stream) {
      stream(g + k, run[0]);
    } else {
      narrow_run<D>(run, g + k);
    }
  }
}

// Times dz/dx of a soft-capped model, from the value: output_scale input_scale (1 - tanh^2).
void softcap_slope(const Model& model, const float* z, int n, float* g) {
  for (int k = 0; k < n; k += W) {
    const vf x = load(z + k);
    const vf tanh = x * (1.0f / model.output_scale);
    const vf slope = (model.output_scale * model.input_scale) * (1.0f - tanh * tanh);
    store(g + k, select(x == -kInf, vf{}, load(g + k) * slope));
  }
}

template <DType D>
void store_block_as(const float* g, int n, void* out, int64_t offset) {
  typedef typename Storage<D>::type T;
  T* to = static_cast<T*>(out) + offset;
  const int whole = n / W * W;
  for (int k = 0; k < whole; k += W) narrow<D>(load(g + k), to + k);
  if (whole < n) {
    T tail[W];
    narrow<D>(load(g + whole), tail);
    memcpy(to + whole, tail, (n - whole) * sizeof(T));
  }
}

// For a row of out that is not aligned to the vector, or not even to a float, as an array of NumPy's need not be.
void stream_block(const float* g, int n, float* to) {
  int k = 0;
  for (; k < n && reinterpret_cast<uintptr_t>(to + k) % kVectorBytes != 0; ++k) store(to + k, g[k]);
  for (; k + W <= n; k += W) stream(to + k, load(g + k));
  for (; k < n; ++k) store(to + k, g[k]);
}

void store_block(const Job& job, const float* g, int n, int64_t offset) {
  switch (job.out_dtype) {
    case DType::bf16:
      return store_block_as<DType::bf16>(g, n, job.out, offset);
    case DType::f16:
      return store_block_as<DType::f16>(g, n, job.out, offset);
    default:
      if (job.stream_out) return stream_block(g, n, static_cast<float*>(job.out) + offset);
      return store_block_as<DType::f32>(g, n, job.out, offset);
  }
}

// The entry of the sampled token, w_d p (d - D) + w_y (p - 1), on its own: in float32, before any narrowing.
template <int Models, Term T>
float token_gradient(const Row& row, const Token& token, const Coefficients& c) {
  Block b;
  b.share = row.share;
  for (int i = 0; i < Models; ++i) {
    store(b.buffer[i], splat(-kInf));
    b.buffer[i][0] = token.x[i];
    b.x[i] = b.buffer[i];
  }
  Coefficients only = c;
  only.token = 1.0f;
  float g[W], p[W];
  gradient_block<Models, Term::token, false, false, DType::f32>(b, W, only, p);
  only.token = 0.0f;
  gradient_block<Models, T, false, false, DType::f32>(b, W, only, g);
  store(g, load(g) + c.token * (load(p) - 1.0f));
  if (row.model[0]->softcap) softcap_slope(*row.model[0], b.x[0], W, g);
  return g[0];
}

template <int Models, Term T, DType D>
void gradient_row(const Row& row, const Coefficients& c, bool clean) {
  typedef typename Storage<D>::type Out;
  const Job& job = row.job;
  const int64_t out_row = row.index * job.out_stride;
  // read before the first store: out may be the student's logits
  const bool has_token = c.token != 0.0f;
  float at_token = 0.0f;
  int64_t token_id = -1;
  if (has_token) {
    const Token token(row);
    if (token.inside) {
      token_id = job.token_ids[row.index];
      at_token = token_gradient<Models, T>(row, token, c);
    }
  }
  // Whole blocks go from the arithmetic straight to out, if that is of the dtype they are read as. In place too: a run
  // is read before it is written.
  const bool streams = job.stream_out && D == DType::f32;
  const uintptr_t address = reinterpret_cast<uintptr_t>(static_cast<Out*>(job.out) + out_row);
  const bool writes_directly =
      job.out_dtype == D && !row.model[0]->softcap && (!streams || address % kVectorBytes == 0);
  Block b;
  alignas(64) float g[kBlock];
  for (int64_t start = 0; start < job.vocab; start += kBlock) {
    const int n = job.vocab - start < kBlock ? int(job.vocab - start) : kBlock;
    const int lanes = padded(n);
    const bool token_here = token_id >= start && token_id < start + n;
    if (n % kRun<D> == 0 && !token_here && writes_directly) {
      Out* const to = static_cast<Out*>(job.out) + out_row + start;
      if constexpr (D == DType::f32) {
        b.load<Models>(row, start, n);
        if (streams) {
          clean ? gradient_block<Models, T, true, true, D>(b, n, c, to)
                : gradient_block<Models, T, false, true, D>(b, n, c, to);
        } else {
          clean ? gradient_block<Models, T, true, false, D>(b, n, c, to)
                : gradient_block<Models, T, false, false, D>(b, n, c, to);
        }
      } else {
        const Entries<D> raw = raw_entries<Models, D>(row, start);
        clean ? gradient_block<Models, T, true>(raw, n, c, to) : gradient_block<Models, T, false>(raw, n, c, to);
      }
      continue;
    }
    b.load<Models>(row, start, n);
    if (clean && lanes == n) {
      gradient_block<Models, T, true, false, DType::f32>(b, n, c, g);
    } else {
      gradient_block<Models, T, false, false, DType::f32>(b, lanes, c, g);
    }
    if (row.model[0]->softcap) softcap_slope(*row.model[0], b.x[0], lanes, g);
    if (token_here) g[token_id - start] = at_token;
    store_block(job, g, n, out_row + start);
  }
}

void zero_row(const Row& row) {
  alignas(64) const float zeros[kBlock] = {};
  for (int64_t start = 0; start < row.job.vocab; start += kBlock) {
    const int n = row.job.vocab - start < kBlock ? int(row.job.vocab - start) : kBlock;
    store_block(row.job, zeros, n, row.index * row.job.out_stride + start);
  }
}

template <int Models>
void gradient(const Row& row, bool clean) {
  const Job& job = row.job;
  Coefficients c(row);
  if (job.divergence_weights != nullptr)
    c.divergence = job.divergence_weights[row.index * job.divergence_weight_stride];
  if (job.token_weights != nullptr) c.token = job.token_weights[row.index * job.token_weight_stride];
  if (job.policy != nullptr) {
    const float slope = -policy_term(*job.policy, {job.statistics, job.statistics_stride}, row.index).dlogprob;
    c.token = job.token_weights != nullptr ? c.token * slope : slope;
  }
  c.divergence = canonical(c.divergence);
  c.token = canonical(c.token);
  const bool divergence = c.divergence != 0.0f;
  if (!divergence && c.token == 0.0f) return zero_row(row);
  if (!row.model[0]->softcap) {  // dz/dx is one number
    c.divergence *= row.model[0]->input_scale;
    c.token *= row.model[0]->input_scale;
  }
  const auto write = [&](auto of) {
    with_dtype(row, [&](auto as) { gradient_row<Models, decltype(of)::term, decltype(as)::dtype>(row, c, clean); });
  };
  if (!divergence) return write(Of<Term::token>());
  with_term(job, [&](auto of) {
    constexpr Term T = decltype(of)::term;
    c.mean = canonical(row.statistic(T == Term::none ? mean_logit : T >= Term::jsd ? centre : mean_gap));
    if (T == Term::mixed) {
      const float w = canonical(job.forward_weights != nullptr ? job.forward_weights[row.index] : job.forward_weight);
      c.forward = c.divergence * w;
      c.divergence *= 1.0f - w;
    }
    if (T == Term::alpha) c.set_rate(job.alpha);
    const float size = __builtin_fabsf(c.divergence);
    if ((T == Term::reverse_kl || T == Term::mixed) && size > 1.0f) {  // times d, which may be a mask
      c.limit = kMaxFloat / size * 0.999f;
      clean = false;
    }
    if constexpr (Models > 1 || T == Term::none) write(of);
  });
}

template <int Models>
void compute(const Row& row) {
  bool clean = false;
  if (row.job.compute_statistics) clean = statistics<Models>(row);
  if (row.job.compute_second_round) second_round<Models>(row, false);
  if (row.job.compute_gradient) gradient<Models>(row, clean);
#if defined(__x86_64__)
  if (row.job.compute_gradient && row.job.stream_out) _mm_sfence();
#endif
}

void compute_row(const Job& job, int64_t index) {
  const Row row(job, index);
  if (row.count == 1) return compute<1>(row);
  if (row.count == 2) return compute<2>(row);
  compute<3>(row);
}

void policy(const Policy& policy, const TokenScores& student, int64_t rows, float* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const PolicyTerm term = policy_term(policy, student, row);
    const float values[] = {term.loss, term.dlogprob, term.advantage, term.clipped, term.importance};
    for (int i = 0; i < 5; ++i) out[i * out_stride + row] = values[i];
  }
}

void losses(const Losses& losses, int64_t rows, float* out) {
  for (int64_t row = 0; row < rows; ++row) out[row] = token_loss(losses, row);
}

// ---------------------------------------------------------------------------------------------------- sums of models

// Entries below this are masks; so in objective/combination.py.
constexpr float kMask = -kMaxFloat * 1e-3f;
constexpr float kLargest = kMaxFloat * 0x1p-26f;

// What is the same for all entries of a row.
struct Added {
  float maximum, shift;  // z - maximum + shift: the log-prob, in a mixture and its log-weight
  float weight, lowest;  // of a sum of log-probs
};

// log(e^a + e^b); where one is NaN that.
inline vf log_add(vf a, vf b) {
  const vf high = max(a, b), low = min(a, b);
  const vf sum = high + log(1.0f + exp(low - high));
  return select((a == a) & (b == b), select(high == -kInf, high, sum), a + b);
}

template <bool Mixture>
inline vf added(const Addition& addition, const Added& row, vf z, vf total) {
  vf x = (z - row.maximum) + row.shift;
  if constexpr (Mixture) {
    if (row.weight == 0.0f) x = splat(-kInf);
    if (!addition.first) x = log_add(total, x);
  } else {
    const vi outside = x == -kInf;
    x = select(outside, x, max(splat(row.lowest), x) * row.weight);
    if (row.weight == 0.0f) x = vf{};
    if (!addition.first) x = total + x;
  }
  if (!addition.last) return x;
  if constexpr (!Mixture) x = min(splat(kLargest), x);
  return select((x < kMask) & (x != -kInf), splat(-kMaxFloat), x);
}

template <bool Mixture>
void add_row(const Addition& addition, const Added& row, int64_t index) {
  float* const out = addition.out + index * addition.out_stride;
  alignas(64) float buffer[kBlock];
  for (int64_t start = 0; start < addition.vocab; start += kBlock) {
    const int n = addition.vocab - start < kBlock ? int(addition.vocab - start) : kBlock;
    const float* const z = load_block(addition.model, index, start, n, buffer);
    float* const to = out + start;
    const int whole = n / W * W;
    for (int k = 0; k < whole; k += W) {
      __builtin_prefetch(to + k + kPrefetch, 1);
      store(to + k, added<Mixture>(addition, row, load(z + k), load(to + k)));
    }
    if (whole == n) continue;
    float tail[W] = {};
    memcpy(tail, to + whole, (n - whole) * sizeof(float));
    store(tail, added<Mixture>(addition, row, load(z + whole), load(tail)));
    memcpy(to + whole, tail, (n - whole) * sizeof(float));
  }
}

void add(const Addition& addition, int64_t index) {
  const double weight = addition.weights != nullptr ? addition.weights[index] : addition.weight;
  const double total = addition.total_weights != nullptr ? addition.total_weights[index] : addition.total_weight;
  const float logsum = addition.logsum[index];
  // a row without support has no normaliser: its entries are -inf
  Added row{addition.maximum[index], logsum == -kInf ? 0.0f : -logsum, float(weight), 0.0f};
  if (addition.mixture) {
    row.shift += __builtin_logf(row.weight);
    return add_row<true>(addition, row, index);
  }
  row.lowest = float(-0.25 * kMaxFloat / (total > 1.0 ? total : 1.0));
  add_row<false>(addition, row, index);
}

void map(const char* function, float* values, int64_t n) {
  for (int64_t k = 0; k + W <= n; k += W) {
    const vf x = load(values + k);
    store(values + k, function[0] == 'e' ? exp<true>(x) : function[0] == 'l' ? log(x) : tanh(x));
  }
}

}  // namespace
}  // namespace GOPD_ISA

#define GOPD_CONCATENATE(a, b) a##b
#define GOPD_KERNELS(isa) GOPD_CONCATENATE(kernels_, isa)
#define GOPD_STRING_OF(x) #x
#define GOPD_STRING(x) GOPD_STRING_OF(x)
const Kernels GOPD_KERNELS(GOPD_ISA) = {GOPD_STRING(GOPD_ISA), GOPD_ISA::compute_row, GOPD_ISA::policy,
                                        GOPD_ISA::losses,      GOPD_ISA::add,         GOPD_ISA::map};

}  // namespace fused_gopd
