"""What a page shows: one module for each section makes figures of its facts."""
