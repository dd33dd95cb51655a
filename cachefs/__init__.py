"""cachefs: a read-through FUSE cache for datasets on slow storage."""

__version__ = "0.1.0"
