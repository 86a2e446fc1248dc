"""The explorer: a local web page that shows a model's results for a dropped scan."""
