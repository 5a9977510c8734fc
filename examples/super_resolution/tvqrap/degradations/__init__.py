"""How low-resolution pictures come about."""
