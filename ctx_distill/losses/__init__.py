"""Losses: plain torch functions that return a dict of named terms. One family a file."""
