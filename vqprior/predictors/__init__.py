"""Index predictors, which are public as ``vqprior.<Name>``."""
