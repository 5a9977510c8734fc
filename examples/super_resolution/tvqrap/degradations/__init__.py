"""Makes low-resolution images from high-resolution crops."""
