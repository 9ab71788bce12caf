"""Measuring a trained model: perplexity by source and domain."""
