// Kernels that pass over rows: conversions, norms, rotary embedding, activations, and those of sampling.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

inline void convert(const void* from, Float from_type, void* to, Float to_type, std::int64_t count) {
  with_type(from_type, [&](auto source) {
    with_type(to_type, [&](auto target) {
      using S = decltype(source);
      using T = decltype(target);
      const auto* in = static_cast<const typename S::Item*>(from);
      auto* out = static_cast<typename T::Item*>(to);
      std::int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) T::store(out + i, S::load(in + i));
      const int rest = static_cast<int>(count - i);
      if (rest > 0) store_some<T>(out + i, S::load_some(in + i, rest), rest);
    });
  });
}

// 1 / sqrt(mean of squares + eps); sums within lanes first, then over the lanes.
VLLMLITE_INLINE float inverse_rms(const float* x, int size, float eps) {
  F squares{};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) squares = fma(load<F>(x + i), load<F>(x + i), squares);
  if (i < size) {
    const F rest = load_some<F>(x + i, size - i);
    squares = fma(rest, rest, squares);
  }
  return 1.0F / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + eps);
}

template <typename W, typename T>
VLLMLITE_INLINE void scale_row(const float* x, float factor, const typename W::Item* weight, typename T::Item* out,
                               int size) {
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) T::store(out + i, load<F>(x + i) * factor * W::load(weight + i));
  const int rest = size - i;
  if (rest > 0) store_some<T>(out + i, load_some<F>(x + i, rest) * factor * W::load_some(weight + i, rest), rest);
}

// The row to normalise: x + residual, which is written to the row's sum, or x if there is no residual.
VLLMLITE_INLINE const float* normed_row(const NormRow& row) {
  if (row.residual == nullptr) return row.x;
  int i = 0;
  for (; i + kLanes <= row.size; i += kLanes) store(row.sum + i, load<F>(row.x + i) + load<F>(row.residual + i));
  for (; i < row.size; ++i) row.sum[i] = row.x[i] + row.residual[i];
  return row.sum;
}

inline void rms_norm(const NormRow& row) {
  const float* x = normed_row(row);
  const float factor = inverse_rms(x, row.size, row.eps);
  with_type(row.weight_type, [&](auto weight) {
    with_type(row.out_type, [&](auto out) {
      using W = decltype(weight);
      using T = decltype(out);
      scale_row<W, T>(x, factor, static_cast<const typename W::Item*>(row.weight),
                      static_cast<typename T::Item*>(row.out), row.size);
    });
  });
}

VLLMLITE_INLINE float mean(const float* x, int size) {
  F total{};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) total += load<F>(x + i);
  if (i < size) total += load_some<F>(x + i, size - i);
  return sum(total) / static_cast<float>(size);
}

// 1 / sqrt(mean of squared distances from `middle` + eps).
VLLMLITE_INLINE float inverse_deviation(const float* x, float middle, int size, float eps) {
  F squares{};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const F away = load<F>(x + i) - middle;
    squares = fma(away, away, squares);
  }
  float rest = 0;
  for (; i < size; ++i) rest += (x[i] - middle) * (x[i] - middle);
  return 1.0F / __builtin_sqrtf((sum(squares) + rest) / static_cast<float>(size) + eps);
}

inline void layer_norm(const LayerNormRow& row) {
  const float* x = normed_row(row);
  const float middle = mean(x, row.size), factor = inverse_deviation(x, middle, row.size, row.eps);
  with_type(row.weight_type, [&](auto weight) {
    with_type(row.out_type, [&](auto out) {
      using W = decltype(weight);
      using T = decltype(out);
      const auto* weights = static_cast<const typename W::Item*>(row.weight);
      const auto* biases = static_cast<const typename W::Item*>(row.bias);
      auto* to = static_cast<typename T::Item*>(row.out);
      const auto normed = [&](F v, F w, F b) { return fma((v - middle) * factor, w, b); };
      int i = 0;
      for (; i + kLanes <= row.size; i += kLanes)
        T::store(to + i, normed(load<F>(x + i), W::load(weights + i), biases ? W::load(biases + i) : F{}));
      const int rest = row.size - i;
      if (rest > 0)
        store_some<T>(to + i,
                      normed(load_some<F>(x + i, rest), W::load_some(weights + i, rest),
                             biases ? W::load_some(biases + i, rest) : F{}),
                      rest);
    });
  });
}

inline void prepare_head(const HeadRow& row) {
  float* x = row.x;
  if (row.weight != nullptr) {
    const float factor = inverse_rms(x, row.size, row.eps);
    with_type(row.weight_type, [&](auto weight) {
      using W = decltype(weight);
      scale_row<W, F32>(x, factor, static_cast<const typename W::Item*>(row.weight), x, row.size);
    });
  }
  if (row.cos_sin == nullptr) return;
  const int half = row.rotary_dim / 2;
  const float *cosines = row.cos_sin, *sines = row.cos_sin + half;
  if (row.interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F a = load<F>(x + i), b = load<F>(x + half + i);
    const F c = load<F>(cosines + i), s = load<F>(sines + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosines[i] - b * sines[i];
    x[half + i] = b * cosines[i] + a * sines[i];
  }
}

// The error function by Abramowitz & Stegun 7.1.26; the error is at most 1.5e-7.
VLLMLITE_INLINE F erf(F x) {
  const F size = (F)((U)x & 0x7fffffff);
  const F t = 1.0F / fma(size, set(0.3275911F), set(1.0F));
  F p = set(1.061405429F);
  p = fma(p, t, set(-1.453152027F));
  p = fma(p, t, set(1.421413741F));
  p = fma(p, t, set(-0.284496736F));
  p = fma(p, t, set(0.254829592F));
  const F result = 1.0F - p * t * exp(-(size * size));
  return (F)((U)result | ((U)x & 0x80000000));
}

template <Activation kKind>
VLLMLITE_INLINE F activated(F x) {
  if constexpr (kKind == Activation::relu) return x < 0.0F ? F{} : x;
  if constexpr (kKind == Activation::silu) return x / (1.0F + exp(-x));
  if constexpr (kKind == Activation::gelu) return 0.5F * x * (1.0F + erf(x * 0.70710678F));
  // 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
  const F u = 0.79788456F * fma(x * x * x, set(0.044715F), x);
  return x / (1.0F + exp(-2.0F * u));
}

// The gated activation of gpt-oss: gate * sigmoid(1.702 * gate) * (up + 1), with gate at most 7 and up within 7 and -7.
VLLMLITE_INLINE F clamped_swiglu(F gate, F up) {
  gate = gate > 7.0F ? set(7.0F) : gate;
  up = up > 7.0F ? set(7.0F) : up;
  up = up < -7.0F ? set(-7.0F) : up;
  return gate / (1.0F + exp(-1.702F * gate)) * (up + 1.0F);
}

template <Activation kKind, typename T>
VLLMLITE_INLINE void activate_row(const float* x, const float* up, typename T::Item* out, int size) {
  const auto gated = [&](F v, F factor) {
    if constexpr (kKind == Activation::clamped_swiglu)
      return clamped_swiglu(v, factor);
    else
      return up == nullptr ? activated<kKind>(v) : activated<kKind>(v) * factor;
  };
  int i = 0;
  for (; i + kLanes <= size; i += kLanes)
    T::store(out + i, gated(load<F>(x + i), up == nullptr ? F{} : load<F>(up + i)));
  const int rest = size - i;
  if (rest > 0)
    store_some<T>(out + i, gated(load_some<F>(x + i, rest), up == nullptr ? F{} : load_some<F>(up + i, rest)), rest);
}

inline void activate(Activation kind, const float* x, const float* up, void* out, Float out_type, int size) {
  with_type(out_type, [&](auto type) {
    using T = decltype(type);
    auto* to = static_cast<typename T::Item*>(out);
    switch (kind) {
      case Activation::silu:
        return activate_row<Activation::silu, T>(x, up, to, size);
      case Activation::gelu:
        return activate_row<Activation::gelu, T>(x, up, to, size);
      case Activation::gelu_tanh:
        return activate_row<Activation::gelu_tanh, T>(x, up, to, size);
      case Activation::relu:
        return activate_row<Activation::relu, T>(x, up, to, size);
      case Activation::clamped_swiglu:
        return activate_row<Activation::clamped_swiglu, T>(x, up, to, size);
    }
  });
}

inline void soft_cap(float* x, float cap, std::int64_t size) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(x + i, capped(load<F>(x + i), cap));
  const int rest = static_cast<int>(size - i);
  if (rest > 0) store_some<F32>(x + i, capped(load_some<F>(x + i, rest), cap), rest);
}

inline void add_scaled(const float* x, float factor, float* y, std::int64_t size) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(y + i, load<F>(y + i) + factor * load<F>(x + i));
  for (; i < size; ++i) y[i] = y[i] + factor * x[i];
}

inline std::int64_t argmax(const float* x, std::int64_t size) {
  F best = set(-__builtin_inff());
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) best = max(load<F>(x + i), best);  // a NaN does not change `best`
  float top = largest(best);
  for (; i < size; ++i) top = x[i] > top ? x[i] : top;
  for (i = 0; i < size && top > -__builtin_inff(); ++i)
    if (x[i] == top) return i;
  return 0;
}

inline void weights(const float* x, float largest, float factor, float least, float* out, std::int64_t size) {
  const auto weigh = [&](F v) {
    const F w = exp((v - largest) * factor);
    return v >= least ? w : F{};  // 0 for a NaN
  };
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, weigh(load<F>(x + i)));
  const int rest = static_cast<int>(size - i);
  if (rest > 0) store_some<F32>(out + i, weigh(load_some<F>(x + i, rest)), rest);
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
