"""OpenAI's completions, chat completions and embeddings, with vLLM's additions."""
