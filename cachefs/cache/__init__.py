"""Which bytes are in scratch, how they get there, and what serves an open file."""
