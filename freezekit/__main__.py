"""``python -m freezekit``."""

from freezekit.cli import main

main()
