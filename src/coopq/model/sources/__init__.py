"""Where a model comes from: folders, hub ids and GGUF files, what their tensors hold, and the class they load as."""
