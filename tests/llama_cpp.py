"""Text by xllamacpp, llama.cpp itself in a wheel."""

from pathlib import Path

import xllamacpp


def llama_cpp_text(file: Path, prompt: str) -> str:
    """Some tokens after a prompt, the likeliest ones."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 256
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": 8, "temperature": 0.0})
    return str(answer["choices"][0]["text"])
