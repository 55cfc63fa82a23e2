"""Tiny bases, add-ons, worlds, requests and runs that the tests of several rooms stand on."""
