"""Numbers against other implementations: a package where it is installed, recorded arrays."""
