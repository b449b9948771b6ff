"""The sections of the page: each draws its facts as figures, and no arithmetic of the domain."""
