"""What is refused before anything is compiled or launched."""
