"""Container images: an Image is a value (image.py), built and named by its content (build.py)."""

from fractal.images.image import Image

__all__ = ["Image"]
