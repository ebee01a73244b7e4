"""The hot half: stages and steps are recorded, resolved in deferred batches, and sent as frames."""
