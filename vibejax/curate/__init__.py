"""What `python -m vibejax.curate` decides by: copies, duplicates, repetition, rollouts."""
