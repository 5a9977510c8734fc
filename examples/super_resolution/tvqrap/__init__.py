"""TVQ&RAP: what the scripts beside this folder are made of.

``models`` assembles networks from vqprior and loads weights, ``training`` trains them,
``degradations`` spoils images to train on, and ``images`` reads, cuts and writes them.
"""
