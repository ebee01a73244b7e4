"""What goes from a traced process to its relay, and the socket it goes over."""
