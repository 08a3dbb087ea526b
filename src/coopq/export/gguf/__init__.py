"""GGUF files for llama.cpp, made from a full-precision GGUF file of the model."""
