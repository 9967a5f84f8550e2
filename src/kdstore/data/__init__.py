"""Sources of (key, captions, image)."""
