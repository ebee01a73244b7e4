"""Frames and the socket they go over."""
