"""The Llama family, and SmolLM2, which shares its architecture: sizes, builders, and other formats' names."""
