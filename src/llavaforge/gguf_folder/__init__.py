"""GGUF: a model folder as the files that llama.cpp and Ollama open."""
