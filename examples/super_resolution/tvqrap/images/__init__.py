"""Reading, writing, pairing, tiling and comparing images."""
