"""Small pictures that tests generate."""

import io

import numpy as np
from PIL import Image

from lance_jax.pictures import Pictures


def encoded(pixels, format="PNG", **options):
    """The bytes of a picture file; pixels are an array or a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pictures(n=5, side=4, seed=0, classes=("a", "b", "c"), **fields):
    """Pictures of noise as PNG files, and their pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)
    labels = np.arange(n, dtype=np.int32) % len(classes)
    return Pictures([encoded(p) for p in pixels], labels, classes, side, **fields), pixels
