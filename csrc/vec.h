// Vectors of the width of the instruction set being compiled for, and the functions of them that the row kernels need.
//
// Written with the vector extensions of GCC and Clang; the only intrinsics are max, min and fma, the conversions from
// 16 bits and to fp16, and the non-temporal stores. This header is compiled once per instruction set. Everything in it
// sits in a namespace of that name and it includes no C++ standard header: an inline function shared between objects
// that are compiled with different flags could be linked in the wrong version.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// For what hot loops have several times. The compiler would rather call it in some of them, at the cost of its work.
#define GOPD_INLINE __attribute__((always_inline))

namespace fused_gopd {
namespace GOPD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int W = kVectorBytes / 4;  // lanes

typedef float vf __attribute__((vector_size(kVectorBytes)));
typedef int32_t vi __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vh __attribute__((vector_size(kVectorBytes / 2)));  // raw 16-bit floats

constexpr float kInf = __builtin_huge_valf();
constexpr float kMaxFloat = 3.40282347e+38f;

inline vf splat(float x) { return x - vf{}; }  // - and not +: -0 stays -0
inline vi splat_int(int32_t x) { return x + vi{}; }

template <class Vector, class T>
inline Vector load(const T* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class Vector, class T>
inline void store(T* p, const Vector& v) {
  memcpy(p, &v, sizeof v);
}
inline vf load(const float* p) { return load<vf>(p); }

template <class To, class From>
inline To bits(const From& v) {
  static_assert(sizeof(To) == sizeof(From), "same width");
  To out;
  memcpy(&out, &v, sizeof out);
  return out;
}

// Where the two operands do not compare (NaN), both return the second. Intrinsics, because GCC finds the instruction
// for the comparison in some operand orders only.
#if defined(__AVX512F__)
inline vf max(vf a, vf b) { return bits<vf>(_mm512_maskz_max_ps(0xffff, bits<__m512>(a), bits<__m512>(b))); }
inline vf min(vf a, vf b) { return bits<vf>(_mm512_maskz_min_ps(0xffff, bits<__m512>(a), bits<__m512>(b))); }
#elif defined(__AVX2__)
inline vf max(vf a, vf b) { return bits<vf>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b))); }
inline vf min(vf a, vf b) { return bits<vf>(_mm256_min_ps(bits<__m256>(a), bits<__m256>(b))); }
#elif defined(__x86_64__)
inline vf max(vf a, vf b) { return bits<vf>(_mm_max_ps(bits<__m128>(a), bits<__m128>(b))); }
inline vf min(vf a, vf b) { return bits<vf>(_mm_min_ps(bits<__m128>(a), bits<__m128>(b))); }
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif
// a b + c in one rounding where there is an instruction for it. Elsewhere the compiler fuses or not as it likes, which
// must not make the difference between two models with the same logits: there, this and rounded() are explicit.
#if defined(__AVX512F__)
inline vf fma(vf a, vf b, vf c) { return bits<vf>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c))); }
#elif defined(__AVX2__)
inline vf fma(vf a, vf b, vf c) { return bits<vf>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c))); }
#elif defined(__aarch64__)
inline vf fma(vf a, vf b, vf c) {
  return bits<vf>(vfmaq_f32(bits<float32x4_t>(c), bits<float32x4_t>(a), bits<float32x4_t>(b)));
}
#else
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif

// x as a register holds it: a product that is not to be fused with a sum.
inline vf rounded(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

inline vf abs(vf x) { return bits<vf>(bits<vi>(x) & splat_int(INT32_MAX)); }
inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vf keep(vi mask, vf x) { return bits<vf>(mask & bits<vi>(x)); }  // x or 0

// A store past the caches, which spares reading the destination before it is overwritten. p is aligned to the vector.
inline void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, bits<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, bits<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(p, bits<__m128>(v));
#else
  store(p, v);
#endif
}

// ---- across lanes

template <int Bytes>
struct Floats {
  typedef float type __attribute__((vector_size(Bytes)));
};

template <int Bytes, class Combine>
inline float reduce(typename Floats<Bytes>::type v, Combine combine) {
  if constexpr (Bytes == 16) {
    return combine(combine(v[0], v[1]), combine(v[2], v[3]));
  } else {
    typedef typename Floats<Bytes / 2>::type Half;
    Half half[2];
    memcpy(half, &v, sizeof half);
    return reduce<Bytes / 2>(combine(half[0], half[1]), combine);
  }
}
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
inline float sum_lanes(vf v) { return reduce<kVectorBytes>(v, Add()); }
inline float max_lanes(vf v) { return reduce<kVectorBytes>(v, Max()); }

// ---- elementary functions; errors measured over all floats of the domain by tests/rowops/test_native.py

// 2^(j / kSteps) for all j from one or two registers: what a lookup spares the polynomial.
#if defined(__AVX512F__)
constexpr int kLogSteps = 5;
#elif defined(__AVX2__)
constexpr int kLogSteps = 3;
#else
constexpr int kLogSteps = 0;  // no instruction for it
#endif
constexpr int kSteps = 1 << kLogSteps;

// Entry j is the mantissa field of 2^(j / kSteps) less (j << 23 - kLogSteps), which exponential() adds to it.
struct Fractions {
  alignas(64) int32_t bits[kSteps];
  constexpr Fractions() : bits() {
    constexpr int32_t mantissas[32] = {// of 2^(j / 32)
                                       0x000000, 0x02cd87, 0x05aac3, 0x08980f, 0x0b95c2, 0x0ea43a, 0x11c3d3, 0x14f4f0,
                                       0x1837f0, 0x1b8d3a, 0x1ef532, 0x227043, 0x25fed7, 0x29a15b, 0x2d583f, 0x3123f6,
                                       0x3504f3, 0x38fbaf, 0x3d08a4, 0x412c4d, 0x45672a, 0x49b9be, 0x4e248c, 0x52a81e,
                                       0x5744fd, 0x5bfbb8, 0x60ccdf, 0x65b907, 0x6ac0c7, 0x6fe4ba, 0x75257d, 0x7a83b3};
    for (int j = 0; j < kSteps; ++j) bits[j] = mantissas[j * (32 / kSteps)] - (j << (23 - kLogSteps));
  }
};
inline constexpr Fractions kFractions;

// Entry (index modulo kSteps) of kFractions.
GOPD_INLINE inline vi fraction(vu index) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_load_si512(kFractions.bits), high = _mm512_load_si512(kFractions.bits + 16);
  return bits<vi>(_mm512_permutex2var_epi32(low, bits<__m512i>(index), high));
#elif defined(__AVX2__)
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kFractions.bits));
  return bits<vi>(_mm256_permutevar8x32_epi32(table, bits<__m256i>(index)));
#else
  (void)index;
  return vi{};
#endif
}

// e^x for x <= 88 and NaN, to 4 ulp for |x| < 20 and 7 ulp anywhere; exactly 1 at 0, exactly 0 at -inf and below -88.1,
// and below the normal numbers where e^x is. With Upper any x: +inf above 88.8.
//
// x = (n + j / kSteps) ln 2 + r with |r| <= ln 2 / 2 kSteps; e^x = 2^n 2^(j / kSteps) e^r, with a polynomial that is 1
// at 0 and minimax for the relative error: 5e-8 with 32 steps, 3e-8 with 8, 1e-7 with 1. Adding 1.5 2^23 / kSteps
// rounds to a multiple of 1 / kSteps; with 127 on top the low bits are j and above it the exponent field of 2^n.
//
// Error in ulp of the result, at most: 1/2 each from 2^(j / kSteps) and from the last product, 1 from e^r (its ulp is
// up to twice the result's), 0.9 from the polynomial and 0.032 |n| from the one constant for ln 2, which is 1.9e-9 off.
// A second part of ln 2 would be one more instruction in a dozen, and the row statistics do little else.
struct Exponential {
  vf p, scale;  // e^r and 2^(n + j / kSteps)
  vf value() const { return rounded(p * scale); }
  vf plus(vf sum) const { return fma(p, scale, sum); }
};

template <bool Upper = false>
GOPD_INLINE inline Exponential exponential(vf x) {
  constexpr float kRound = 12582912.0f / kSteps + 127.0f;
  x = max(splat(-88.0296919f), x);                      // n = -127 and j = 0, whose bits are those of 0
  if constexpr (Upper) x = min(splat(88.7228394f), x);  // n = 128 and j = 0: those of inf
  const vf shifted = x * 1.44269504f + kRound;
  const vf n = shifted - kRound;
  const vf scale = bits<vf>((vi)(bits<vu>(shifted) << (23 - kLogSteps)) + fraction(bits<vu>(shifted)));
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const vf r = x - n * 0.69314718f;
#else
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // the first part is short enough for an exact product
#endif
  vf p;
  if constexpr (kSteps == 32) {
    p = splat(4.99999983e-1f);
    p = p * r + 1.00001466f;
  } else if constexpr (kSteps == 8) {
    p = splat(1.66642823e-1f);
    p = p * r + 5.00064845e-1f;
    p = p * r + 1.00000005f;
  } else {
    p = splat(8.312520235198987e-3f);
    p = p * r + 4.189015683876286e-2f;
    p = p * r + 1.6667114648959297e-1f;
    p = p * r + 4.9999231495155516e-1f;
    p = p * r + 1.0f;
  }
  p = p * r + 1.0f;
  return {p, scale};
}

template <bool Upper = false>
GOPD_INLINE inline vf exp(vf x) {
  return exponential<Upper>(x).value();
}

// log x to 1 ulp for normal positive x, and NaN. x = 2^e m with m in [sqrt 1/2, sqrt 2); polynomial of Cephes' logf.
GOPD_INLINE inline vf log(vf x) {
  const vi e = (bits<vi>(x) - 0x3f3504f3) >> 23;
  const vf f = bits<vf>(bits<vi>(x) - (e << 23)) - 1.0f;
  const vf n = __builtin_convertvector(e, vf);
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf square = f * f;
  vf low = p * f * square - n * 2.12194440e-4f;
  low = low - 0.5f * square;
  return select(x == x, (low + f) + n * 0.693359375f, x);
}

// tanh x to 2 ulp: Cephes' tanhf near 0, 1 - 2 / (e^2|x| + 1) elsewhere.
GOPD_INLINE inline vf tanh(vf x) {
  const vi sign = bits<vi>(x) & splat_int(INT32_MIN);
  const vf a = bits<vf>(bits<vi>(x) ^ sign);
  const vf s = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const vf far = 1.0f - 2.0f / (exp<true>(a + a) + 1.0f);
  return select(a < 0.625f, x + x * s * p, bits<vf>(bits<vi>(far) | sign));
}

// ---- storage types

template <DType D>
struct Storage {
  typedef uint16_t type;
};
template <>
struct Storage<DType::f32> {
  typedef float type;
};

// Intrinsics, because GCC 12 widens in two halves: five instructions for one, a tenth of a pass over bfloat16 logits.
GOPD_INLINE inline vu to_u32(vh h) {
#if defined(__AVX512F__)
  return bits<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, bits<__m256i>(h)));
#elif defined(__AVX2__)
  return bits<vu>(_mm256_cvtepu16_epi32(bits<__m128i>(h)));
#elif defined(__x86_64__)
  return bits<vu>(_mm_unpacklo_epi16(_mm_cvtsi64_si128(bits<int64_t>(h)), _mm_setzero_si128()));
#else
  return __builtin_convertvector(h, vu);
#endif
}
inline vh to_u16(vu u) { return __builtin_convertvector(u, vh); }

GOPD_INLINE inline vf half_to_float(vh h) {
#if defined(__AVX512F__)
  return bits<vf>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(h)));
#elif defined(__F16C__)
  return bits<vf>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
  const vu u = to_u32(h);
  const vu magnitude = (u & 0x7fff) << 13;
  // the product moves the exponent from bias 15 to bias 127 and normalises fp16's subnormal numbers
  const vu finite = bits<vu>(bits<vf>(magnitude) * 0x1p112f);
  const vu special = magnitude | 0x7f800000;
  return bits<vf>((vu)((u & 0x7c00) == 0x7c00 ? special : finite) | (u & 0x8000) << 16);
#endif
}

GOPD_INLINE inline vh float_to_half(vf x) {
#if defined(__AVX512F__)
  return bits<vh>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits<vh>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const vu u = bits<vu>(x);
  const vu sign = u & 0x80000000u;
  const vu a = u ^ sign;
  const vu normal = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;  // ties to even; 65520 and above carry into inf
  const vu subnormal = bits<vu>(bits<vf>(a) + 0.5f) - 0x3f000000u;     // ulp of 0.5 is fp16's smallest number
  vu h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x47800000u ? bits<vu>(splat_int(0x7c00)) : h;
  h = a > 0x7f800000u ? bits<vu>(splat_int(0x7e00)) : h;
  return to_u16(h | sign >> 16);
#endif
}

GOPD_INLINE inline vf bfloat_to_float(vh h) { return bits<vf>(to_u32(h) << 16); }

GOPD_INLINE inline vh float_to_bfloat(vf x) {
  const vu u = bits<vu>(x);
  const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // ties to even
  return to_u16(x == x ? rounded : (u >> 16 | 0x40));     // NaN stays NaN, and quiet
}

template <DType D>
GOPD_INLINE inline vf widen(const typename Storage<D>::type* p) {
  if constexpr (D == DType::f32) return load(p);
  if constexpr (D == DType::bf16) return bfloat_to_float(load<vh>(p));
  if constexpr (D == DType::f16) return half_to_float(load<vh>(p));
}

template <DType D>
GOPD_INLINE inline void narrow(vf x, typename Storage<D>::type* p) {
  if constexpr (D == DType::f32) store(p, x);
  if constexpr (D == DType::bf16) store(p, float_to_bfloat(x));
  if constexpr (D == DType::f16) store(p, float_to_half(x));
}

// ---- runs: a vector's bytes of entries, which are one vector of float32 and two of 16 bits

template <DType D>
constexpr int kVectors = D == DType::f32 ? 1 : 2;
template <DType D>
constexpr int kRun = kVectors<D> * W;  // entries

template <int I>
struct Index {
  static constexpr int value = I;
};

// action(Index<i>()) for every vector i of a run; a lambda is GOPD_INLINE.
template <DType D, class Action>
GOPD_INLINE inline void each_vector(const Action& action) {
  action(Index<0>());
  if constexpr (kVectors<D> == 2) action(Index<1>());
}

// Vector I of a run. Of bfloat16 it has the even or the odd entries, by a shift or a mask: in order, they would have to
// be moved to lanes of twice the width, and back.
template <DType D, int I>
GOPD_INLINE inline vf widen_run(const typename Storage<D>::type* p) {
  if constexpr (D == DType::f32) return load(p);
  if constexpr (D == DType::bf16) {
    const vu pairs = load<vu>(p);  // an even entry in the low half of a lane
    return bits<vf>(I == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  if constexpr (D == DType::f16) return half_to_float(load<vh>(p + I * W));
}

// The same bits as narrow() makes, of numbers and of a NaN that rounding up leaves one: the processor's own, and a
// widened one of bfloat16. In others all bits may be set.
template <DType D>
GOPD_INLINE inline void narrow_run(const vf* x, typename Storage<D>::type* p) {
  if constexpr (D == DType::f32) store(p, x[0]);
  if constexpr (D == DType::bf16) {
    vu rounded[2];
    for (int i = 0; i < 2; ++i) {
      const vu u = bits<vu>(x[i]);
      rounded[i] = u + 0x7fff + (u >> 16 & 1);  // ties to even
    }
    store(p, rounded[0] >> 16 | (rounded[1] & 0xffff0000u));
  }
  if constexpr (D == DType::f16) {
    for (int i = 0; i < 2; ++i) store(p + i * W, float_to_half(x[i]));
  }
}

}  // namespace GOPD_ISA
}  // namespace fused_gopd
