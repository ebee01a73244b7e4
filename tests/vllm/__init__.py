"""The vLLM plugin, on stand-ins, on published wheels, and in the real server."""
