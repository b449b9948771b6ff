"""Bad input is refused before anything is compiled or launched."""
