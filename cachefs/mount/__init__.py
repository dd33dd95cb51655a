"""The life of a mount: checks before it, the daemon that serves it, its lease and control socket, its end."""
