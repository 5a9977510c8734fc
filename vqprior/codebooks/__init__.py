"""A shelf, not a namespace: codebooks and their rules are public as ``vqprior.<Name>``."""
