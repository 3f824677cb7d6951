"""Every kernel in Numba: one pass over memory, vectorised, compiled once per machine and cached on disk."""
