"""Judges of answers: the contract in contract.py, one judge a file, the table of all of them in known.py."""
