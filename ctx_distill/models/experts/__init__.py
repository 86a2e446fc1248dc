"""Adapters: one file a library, each an `XrayExpert`."""
