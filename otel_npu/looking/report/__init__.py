"""The page that shows where the time of some spans went."""
