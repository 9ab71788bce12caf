"""From text to token sequences; only `loader` imports torch, so nothing is gathered here."""
