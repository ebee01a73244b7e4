"""README, docs and examples say what is so."""
