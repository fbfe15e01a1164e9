"""The built-in demo model: free text out of Debian packages in, a small Llama-family checkpoint out."""
