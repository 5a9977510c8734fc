"""Networks, their assembly, and weights."""
