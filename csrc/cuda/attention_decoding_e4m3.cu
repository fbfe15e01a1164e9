#include "cuda/attention_decoding.cuh"

template void vllmlite::cuda::attend_decoding_over<vllmlite::cuda::e4m3>(Runtime&, const Attention&);
