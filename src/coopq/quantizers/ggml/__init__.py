"""The types of GGUF files, by ggml."""
