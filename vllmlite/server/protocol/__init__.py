"""What requests and answers hold, an API a file: OpenAI's with vLLM's additions, Anthropic's, llama.cpp's.

Requests are pydantic models, strict about types and names: a parameter that is unknown, or whose feature is absent, is
an error that says so. Answers are typed dictionaries, which cost nothing to make.
"""
