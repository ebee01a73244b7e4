"""The relay: clock, assembling, joining, export, and its life as a process."""
