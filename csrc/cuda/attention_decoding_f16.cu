#include "cuda/attention_decoding.cuh"

template void vllmlite::cuda::attend_decoding_over<vllmlite::cuda::f16>(Runtime&, const Attention&);
