"""ctx-distill: chest-CT understanding distilled from chest-X-ray experts. A research tool, not a medical device."""

__version__ = "0.1.0"
