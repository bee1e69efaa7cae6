"""Stage 5: choose the best of N samples, and measure each strategy."""
