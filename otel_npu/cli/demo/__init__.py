"""`otel-npu demo`: an inference loop on a simulated NPU, traced by the product and drawn from what arrives."""
