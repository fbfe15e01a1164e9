#include "cuda/attention_decoding.cuh"

template void vllmlite::cuda::attend_decoding_over<vllmlite::cuda::i8>(Runtime&, const Attention&);
