"""Models in GGUF files, llama.cpp's format: metadata, tokenizer and weights in one file.

The `gguf` package, of the same project, reads the file and dequantizes its tensors; this room says
what they mean to a `ModelConfig` and to our parameter tree.
"""
