"""The configuration of an engine, and vLLM's options that are refused."""
