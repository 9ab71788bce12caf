"""The training loop: one optimizer update, the curriculum around it, and what a resume needs."""
