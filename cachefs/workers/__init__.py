"""Worker processes that do what may block: started by a small fork server, fed by pools, ended by a signal."""
