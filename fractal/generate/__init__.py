"""Stage 1: a model writes n samples for each problem."""
