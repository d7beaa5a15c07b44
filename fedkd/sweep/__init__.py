"""Sweeps: every label at every point for every seed, each run once, whatever was interrupted."""
