"""Five parallelisms, applied to the model from outside: mesh, collectives, tensor, sequence, expert, ZeRO."""
