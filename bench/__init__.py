"""Benchmarks: `python -m bench NAME`. Each says what it measures, prints a table, and ends with one line of JSON."""
