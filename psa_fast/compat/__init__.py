"""What a dependency offers only privately: one file per dependency, and at each name the reason and its versions.

No other room names anything private of a dependency (`tests/test_private_names.py`); before an upper end of the ranges
in pyproject.toml is raised, these files are what to read.
"""
