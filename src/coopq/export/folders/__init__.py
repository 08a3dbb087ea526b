"""Folders that transformers, vLLM and OpenVINO load."""
