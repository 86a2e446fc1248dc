"""Inference: findings, embedding, saliency and draft report of a scan."""
