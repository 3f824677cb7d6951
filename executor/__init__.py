"""Runs a plan for real over MPI and records what it cost."""
