"""What `python -m bench fuzz` is made of."""
