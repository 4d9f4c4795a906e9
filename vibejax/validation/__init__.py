"""What `tpu/validate.py` checks and measures on the devices of one host."""
