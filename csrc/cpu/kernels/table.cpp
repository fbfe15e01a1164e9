// The table of one instruction set: compiled once for each, with VLLMLITE_ISA its name.
#include "cpu/kernels/amx.hpp"
#include "cpu/kernels/attention.hpp"
#include "cpu/kernels/elementwise.hpp"
#include "cpu/kernels/grouped.hpp"
#include "cpu/kernels/linear.hpp"
#include "cpu/kernels/low_rank.hpp"
#include "cpu/kernels/quantize.hpp"
#include "cpu/kernels/quantized.hpp"

#define VLLMLITE_TEXT_OF(name) #name
#define VLLMLITE_TEXT(name) VLLMLITE_TEXT_OF(name)

namespace vllmlite::cpu::VLLMLITE_ISA {

extern const Kernels kernels;

constinit const Kernels kernels{
    .isa = VLLMLITE_TEXT(VLLMLITE_ISA),
#if defined(__AMX_BF16__)
    .linear = {linear_kernel<FloatProduct<F32>>, linear_kernel<FloatProduct<F16>>, amx_kernel},
    .grouped = {grouped_kernel<FloatProduct<F32>>, amx_grouped_kernel},
#elif defined(__AVX512BF16__)
    .linear = {linear_kernel<FloatProduct<F32>>, linear_kernel<FloatProduct<F16>>, linear_kernel<Bf16Product>},
    .grouped = {grouped_kernel<FloatProduct<F32>>, grouped_kernel<Bf16Product>},
#else
    .linear = {linear_kernel<FloatProduct<F32>>, linear_kernel<FloatProduct<F16>>, linear_kernel<FloatProduct<BF16>>},
    .grouped = {grouped_kernel<FloatProduct<F32>>},
#endif
    .shrink = {linear<FloatProduct<F32>>, linear<FloatProduct<F16>>, linear<FloatProduct<BF16>>},
#if defined(__AVX512BF16__)
    .shrink_bf16 = linear<Bf16Product>,
#else
    .shrink_bf16 = nullptr,
#endif
    .expand = {expand_low_rank<F32>, expand_low_rank<F16>, expand_low_rank<BF16>},
    .quantized = {quantized<TileScheme::int8>, quantized<TileScheme::int4>, quantized<TileScheme::q4_1>,
                  quantized<TileScheme::q5_0>, quantized<TileScheme::q5_1>, quantized<TileScheme::q4_k>,
                  quantized<TileScheme::q5_k>, quantized<TileScheme::q6_k>, quantized<TileScheme::w8a8>,
                  quantized<TileScheme::w4a8_grouped>, quantized<TileScheme::w8a8_grouped>},
    .quantize_x = quantize_x,
    .quantize_tile = {quantize_tile<Int8Group, false>, quantize_tile<Int4Group, true>},
    .convert = convert,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .prepare_head = prepare_head,
    .activate = activate,
    .soft_cap = soft_cap,
    .add_scaled = add_scaled,
#if defined(__AVX512BF16__)
    .attention = {attention<F32Keys>, attention<PairKeys<F16>>, attention<DotKeys>},
#else
    .attention = {attention<F32Keys>, attention<PairKeys<F16>>, attention<PairKeys<BF16>>},
#endif
    .attention_bytes = {attention<ByteKeys<Int8Format>>, attention<ByteKeys<E4m3Format>>,
                        attention<ByteKeys<E5m2Format>>},
    .quantize_head = {quantize_head<Int8Format>, quantize_head<E4m3Format>, quantize_head<E5m2Format>},
    .argmax = argmax,
    .weights = weights,
};

}  // namespace vllmlite::cpu::VLLMLITE_ISA
