"""Encoders, experts and heads: plain torch, no Lightning."""
