"""Building the built-in demo model: a small Llama-family checkpoint, trained on free text of Debian packages."""
