"""The explorer: a local web page where a person drops a scan and sees what a model makes of it."""
