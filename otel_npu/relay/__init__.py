"""The cold half: frames become spans here, in a process of its own, and leave over OTLP."""
