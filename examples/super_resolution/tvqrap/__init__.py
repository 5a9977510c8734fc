"""TVQ&RAP: what the scripts beside this folder are made of.

``models`` assembles networks from vqprior and loads weights, ``training`` trains them,
``degradations`` spoils pictures to train on, and ``pictures`` reads, cuts and writes them.
"""
