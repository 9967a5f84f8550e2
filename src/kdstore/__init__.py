"""kdstore: distil CLIP-style models from a store of precomputed teacher features."""

__version__ = "0.1.0"
