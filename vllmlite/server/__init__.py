"""The HTTP server: OpenAI's API under vLLM's names, on one :class:`~vllmlite.async_llm.AsyncLLM`."""
