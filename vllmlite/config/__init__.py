"""The configuration of an engine, and the options of vLLM that are refused."""
