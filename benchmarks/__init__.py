"""Measurements of whole runs, outside the wheel: ``mitrain bench NAME`` in a clone of the repository."""
