"""Published measurements of real training runs: rows to plans, profiles fitted to them, predictions beside them."""
