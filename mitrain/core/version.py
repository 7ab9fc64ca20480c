"""The version, which set-up reads without importing the package."""

__version__ = "0.1.0"
