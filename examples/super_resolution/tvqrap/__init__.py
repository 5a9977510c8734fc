"""TVQ&RAP: the code behind the scripts of this example.

``models`` assembles networks from vqprior and loads weights, ``training`` trains them,
``degradations`` makes low-resolution images, and ``images`` reads, tiles and writes images.
"""
