"""Data: records and their validation, images, chat encoding, sampling and collation.

Importing this package is light: `records`, `images` and `sampler` need neither torch nor transformers.
"""
