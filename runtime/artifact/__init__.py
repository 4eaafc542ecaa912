"""Exported artifacts: read, checked, called and generated from. Needs torch and nothing else."""
