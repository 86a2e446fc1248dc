"""Losses: plain torch functions that return a dict of named terms; one module per family."""
