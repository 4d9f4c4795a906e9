"""VibeThinker post-training in JAX: `python -m vibejax.rl` starts here."""
