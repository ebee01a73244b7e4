"""Capture, on a simulated NPU with a clock of the test's own."""
