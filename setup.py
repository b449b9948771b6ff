"""The description that a package index shows: README.md without what leads nowhere there.

Everything else is in pyproject.toml. Links and pictures of README.md are relative, for wherever
the repository is kept; an index has none of these files. A link becomes its text, a picture goes.
"""

import re
from pathlib import Path

from setuptools import setup

_RELATIVE = r"\((?!https?://|#)[^)]*\)"
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(rf"!\[[^\]]*\]{_RELATIVE}\n*", "", readme)
setup(
    long_description=re.sub(rf"\[([^\]]+)\]{_RELATIVE}", r"\1", readme),
    long_description_content_type="text/markdown",
)
