"""LoRA adapters (Hu et al. 2021): their files, and the requests that use them."""
