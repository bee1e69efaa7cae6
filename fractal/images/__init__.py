"""The container images that Fractal ships, and how they are built."""
