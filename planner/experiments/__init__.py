"""Experiments: the classic questions of parallel training, predicted and measured side by side."""
