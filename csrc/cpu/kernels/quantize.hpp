// Quantisation of activations to int8, and of weights to int8 and int4 in tiles.
#pragma once

#include "cpu/kernels/simd.hpp"

namespace vllmlite::cpu::VLLMLITE_ISA {

inline constexpr int kGroupVectors = kGroup / kLanes;

// A group of a row: its elements, and the (signed) one of the largest magnitude, NaN if any is not finite.
struct Group {
  F x[kGroupVectors];
  float extreme;

  template <typename T>
  static VLLMLITE_INLINE Group read(const typename T::Item* from, int count) {
    Group group;
    F most{}, least{}, wrong{};
    for (int i = 0; i < kGroupVectors; ++i) {
      const int rest = count - i * kLanes;
      group.x[i] = rest >= kLanes ? T::load(from + i * kLanes) : rest > 0 ? T::load_some(from + i * kLanes, rest) : F{};
      most = max(most, group.x[i]);
      least = max(least, -group.x[i]);
      wrong += group.x[i] * 0.0F;
    }
    const float high = largest(most), low = largest(least);
    group.extreme = (high > low ? high : -low) + sum(wrong);
    return group;
  }
};

// Rounds to the nearest whole number, halves to even, and clamps.
VLLMLITE_INLINE F whole(F x, float low, float high) {
  const F bounded = max(set(low), x);
  return ((bounded < high ? bounded : set(high)) + kRound) - kRound;
}

// Quantises a row of x to int8 in groups: the element of the largest magnitude becomes -128.
inline void quantize_groups(const RowToQuantize& row) {
  for (int g = 0; g * kGroup < row.size; ++g) {
    const Group group = Group::read<F32>(row.x + g * kGroup, smaller(kGroup, row.size - g * kGroup));
    const float inverse = group.extreme == 0 ? 0 : -128.0F / group.extreme;
    F total{}, first{};
    for (int i = 0; i < kGroupVectors; ++i) {
      const F q = whole(group.x[i] * inverse, -128, 127);
      total += q;
      if (i * 2 * kLanes < kGroup) first += q;
      store(row.to.values + g * kGroup + i * kLanes, __builtin_convertvector(__builtin_convertvector(q, I), B));
    }
    row.to.scales[g] = group.extreme * (-1.0F / 128);
    row.to.sums[g] = static_cast<std::int32_t>(sum(total));
    row.to.half_sums[g] = static_cast<std::int32_t>(sum(first));
    row.to.scaled_sums[g] = row.to.scales[g] * static_cast<float>(row.to.sums[g]);
  }
}

// Quantises a row of x to int8 with one scale and zero point.
inline void quantize_whole(const RowToQuantize& row) {
  constexpr float kFar = 512;  // rounded, these values are out of range whatever the zero point is
  F most{}, least{}, wrong{};
  const auto at = [&](int i) {
    const int rest = row.size - i;
    return rest >= kLanes ? load<F>(row.x + i) : load_some<F>(row.x + i, rest);
  };
  for (int i = 0; i < row.size; i += kLanes) {
    const F x = at(i);
    most = max(most, x);
    least = max(least, -x);
    wrong += x * 0.0F;
  }
  const float high = largest(most), below = largest(least);
  float span = 0, steps = 127, scale = row.input.scale, zero = static_cast<float>(row.input.zero);
  float inverse = 1.0F / scale;
  if (row.input.mode != InputMode::constants) {
    if (row.input.mode == InputMode::symmetric) {
      span = larger(high, below);
    } else {
      span = high + below;
      steps = 255;
    }
    inverse = span == 0 ? 0 : steps / span;
    scale = span / steps;
    zero = row.input.mode == InputMode::symmetric ? 0 : ((below * inverse - 128.0F) + kRound) - kRound;
    if (zero != zero) zero = 0;
  }
  const int padded = (row.size + kGroup - 1) / kGroup * kGroup;
  I total{};
  for (int i = 0; i < padded; i += kLanes) {
    I values{};
    if (i < row.size) {
      const F shifted = whole(at(i) * inverse, -kFar, kFar) + zero;
      values = __builtin_convertvector(whole(shifted, -128, 127), I);
      const int rest = row.size - i;
      for (int lane = rest; lane < kLanes; ++lane) values[lane] = 0;
    }
    total += values;
    store(row.to.values + i, __builtin_convertvector(values, B));
  }
  std::int32_t lanes[kLanes], sum_of_values = 0;
  store(lanes, total);
  for (const std::int32_t lane : lanes) sum_of_values += lane;
  *row.to.scales = scale + sum(wrong);  // NaN if an element is not finite
  *row.to.sums = sum_of_values;
  *row.to.zeros = static_cast<std::int32_t>(zero);
}

inline void quantize_x(const RowToQuantize& row) {
  return row.input.mode == InputMode::groups ? quantize_groups(row) : quantize_whole(row);
}

VLLMLITE_INLINE float rounded_to_bf16(float x) { return from_bf16(to_bf16(set(x)))[0]; }

struct Int8Group {
  static constexpr float kLow = -128, kHigh = 127;
  static VLLMLITE_INLINE float scale(const Group& group) { return rounded_to_bf16(group.extreme * (-1.0F / 128)); }
};

// Tries scales around the one that maps the element of the largest magnitude to -8, refits each to its quantised
// values, and returns the one with the least squared error.
struct Int4Group {
  static constexpr int kScaleTries = 9;
  static constexpr float kLow = -8, kHigh = 7;
  static VLLMLITE_INLINE float scale(const Group& group) {
    float best = rounded_to_bf16(group.extreme * -0.125F), least = __builtin_inff();
    for (int step = 0; step < kScaleTries; ++step) {
      const float divisor = 7.0F + 0.25F * static_cast<float>(step);
      const float inverse = -divisor / group.extreme;
      F products{}, squares{};
      for (int i = 0; i < kGroupVectors; ++i) {
        const F q = whole(group.x[i] * inverse, kLow, kHigh);
        products = fma(q, group.x[i], products);
        squares = fma(q, q, squares);
      }
      const float fitted = rounded_to_bf16(sum(products) / sum(squares));
      F errors{};
      for (int i = 0; i < kGroupVectors; ++i) {
        const F error = group.x[i] - whole(group.x[i] * (1.0F / fitted), kLow, kHigh) * fitted;
        errors = fma(error, error, errors);
      }
      const float error = sum(errors);
      if (error < least) {
        least = error;
        best = fitted;
      }
    }
    return best;
  }
};

// Quantises up to kTileRows rows of w into a tile. Returns false if an element is not finite.
template <typename G, bool kPacked>
bool quantize_tile(const TileToQuantize& s) {
  bool finite = true;
  with_type(s.type, [&](auto type) {
    using T = decltype(type);
    for (int g = 0; g * kGroup < s.size; ++g)
      for (int r = 0; r < kTileRows; ++r) {
        float scale = 0;
        F quants[kGroupVectors] = {};
        if (r < s.rows) {
          const auto* from = static_cast<const typename T::Item*>(s.w) + r * s.stride + g * kGroup;
          const Group group = Group::read<T>(from, smaller(kGroup, s.size - g * kGroup));
          if (group.extreme != group.extreme) finite = false;
          if (group.extreme != 0 && group.extreme == group.extreme) scale = G::scale(group);
          for (int i = 0; i < kGroupVectors && scale != 0; ++i)
            quants[i] = whole(group.x[i] * (1.0F / scale), G::kLow, G::kHigh);
        }
        std::uint16_t bits[kLanes];
        BF16::store(bits, set(scale));
        s.scales[g * kTileRows + r] = bits[0];
        float lanes[kGroup];
        for (int i = 0; i < kGroupVectors; ++i) store(lanes + i * kLanes, quants[i] - G::kLow);
        std::uint8_t* to = s.qweight + g * kGroup * kTileRows / (kPacked ? 2 : 1) + r * 4;
        for (int k = 0; k < kGroup; ++k) {
          const auto quant = static_cast<std::uint8_t>(static_cast<int>(lanes[k]));
          if constexpr (kPacked) {
            std::uint8_t& pair = to[k / 8 * kTileRows * 4 + k % 4];
            pair = k / 4 % 2 == 0 ? quant : static_cast<std::uint8_t>(pair | quant << 4);
          } else {
            to[k / 4 * kTileRows * 4 + k % 4] = quant;
          }
        }
      }
  });
  return finite;
}

}  // namespace vllmlite::cpu::VLLMLITE_ISA
