"""Devices: the real torch_npu binding on the simulated runtime, torch's own events, the simulated NPU."""
