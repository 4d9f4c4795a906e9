"""Offline self-distillation, the command `python -m vibejax.distill`."""
