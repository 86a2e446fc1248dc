"""On PYTHONPATH of the tests' jobs: a program of theirs can be held at the start of Python, and in the midst of its imports."""

import importlib.abc
import sys

import holds


class _Imports(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "lightning":
            holds.reach("imports")


if holds.stage():
    holds.reach("start")
    sys.meta_path.insert(0, _Imports())
