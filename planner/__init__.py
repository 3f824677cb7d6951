"""Decides how to split a transformer over workers and predicts what that costs."""
