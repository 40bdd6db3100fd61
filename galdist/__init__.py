"""galdist learns how galaxies populate dark matter and measures what it learned."""

__version__ = "0.1.0"
