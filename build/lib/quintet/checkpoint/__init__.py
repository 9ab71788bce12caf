"""Checkpoints that are whole and unchanged or do not exist: saving, loading, retention, and Hugging Face's format."""
