#include "cuda/attention_decoding.cuh"

template void vllmlite::cuda::attend_decoding_over<vllmlite::cuda::e5m2>(Runtime&, const Attention&);
