"""Images in and out, in pairs, in tiles, and side by side."""
