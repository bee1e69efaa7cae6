"""Fractal: generate N programs a problem, verify them in a sandbox, train a critic, choose the best of N."""

__version__ = "0.1.0"
