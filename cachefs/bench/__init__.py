"""`cachefs bench`: what loads a user's own files fastest, directly and through a mount."""
