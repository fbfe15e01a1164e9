"""The HTTP server: the OpenAI API with vLLM's names, and other APIs, on one :class:`~vllmlite.async_llm.AsyncLLM`."""
