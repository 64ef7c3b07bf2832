"""Import-only stand-in: names that the peer imports and, without packing, does not use."""

__version__ = "0.0.0"
