"""A shelf, not a namespace: predictors are public as ``vqprior.<Name>``."""
