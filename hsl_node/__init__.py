"""hsl-node: HeteroSync Learning between hospitals, without a central server."""

__version__ = "0.1.0"
