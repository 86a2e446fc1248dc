"""Scores with bootstrap intervals over patients: classification, retrieval, generation."""
