"""Text from a language model: prompts of images and texts, prefill, and decoding with a cache."""
