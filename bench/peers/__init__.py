"""The same work on other ways to serve: `python -m bench peers`."""

from .command import add_arguments as add_arguments
