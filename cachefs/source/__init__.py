"""The remote directory: reached only through a descriptor that was opened before mounting."""
