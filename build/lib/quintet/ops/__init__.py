"""Numerical operations, each fast path beside its slow reference."""
