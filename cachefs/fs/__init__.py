"""The file system: kernel-free semantics, and a thin adapter that shows them to FUSE."""
