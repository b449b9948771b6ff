"""The points that are measured, their work, and their order."""
