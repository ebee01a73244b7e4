"""Looking at a running session, from a process of its own: who is there, what it does, and what it did."""
