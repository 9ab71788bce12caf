"""What a pipeline would do, computed without running it."""
