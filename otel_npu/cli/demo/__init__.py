"""`otel-npu demo`: a server on a simulated NPU, traced by the product and drawn from what arrives."""
