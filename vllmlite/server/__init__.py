"""The HTTP server: the OpenAI API with vLLM's names, and others, on one :class:`~vllmlite.async_llm.AsyncLLM`."""
