"""LoRA adapters (Hu et al. 2021): their files, and what requests say about them."""
