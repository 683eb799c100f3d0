"""Models in GGUF files, read as checkpoint folders are: the file's header, its config, its tensors and its tokenizer."""
