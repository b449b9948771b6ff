"""One call explained: its facts as numbers, the sections that draw them, and the page."""
