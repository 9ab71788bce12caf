"""Quintet: from raw text to a trained, checked and exported DeepSeek-V3-class language model."""

__version__ = "0.1.0"
