"""Runs functions on machines: processes, ranks, clusters. Knows no galaxies."""
