"""Search: candidates of a question, their estimates, the best replayed, ranked, explained, run and re-ranked."""
