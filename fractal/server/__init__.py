"""The sandbox over HTTP: `fractal serve --http` (docs/rewards.md)."""
