"""What a run will need and how fast it can be on a slice that is not here; see tpu/plan.py."""
