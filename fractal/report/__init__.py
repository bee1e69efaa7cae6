"""Stage 6: the run's numbers as a summary, charts and a page."""
