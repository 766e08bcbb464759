"""maskmill's package: image shards in, a table of masks and depth maps out."""

__version__ = "0.1.0"
__all__ = ["__version__"]
