"""What reads: plain scripts that know of no cache, each run in a new process; a line of JSON says how it went."""
