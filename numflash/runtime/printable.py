"""Text that may be shown: names and messages that come from files must not steer a terminal."""


def printable(text: str) -> str:
    """The text on one line, with `?` for each character that Unicode does not count as printable.

    Those are control characters, line ends, marks that turn the direction of writing, surrogates.
    """
    return "".join(c if c.isprintable() else "?" for c in text)
