"""Networks, their assembly, and model files."""
