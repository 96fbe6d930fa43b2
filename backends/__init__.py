"""Backends: each file holds one worker, found by name through the entry points of `zmqserve.backends`."""
