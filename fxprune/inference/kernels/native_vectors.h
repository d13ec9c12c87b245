// SIMD vectors of GCC and clang: they become AVX-512, AVX or NEON registers, and a * b + c one fused multiply-add.
#pragma once

namespace fxprune {

template <int LANES>
struct Vector {
  typedef float type __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
};

// Floats in the widest register.
#if defined(__AVX512F__)
constexpr int kWidest = 16;
#elif defined(__AVX__)
constexpr int kWidest = 8;
#else
constexpr int kWidest = 4;
#endif

}  // namespace fxprune
