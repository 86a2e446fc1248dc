"""Using what was trained: a scan in, findings, embedding, saliency, report out."""
