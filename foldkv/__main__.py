"""`python -m foldkv`: the command line without an installation."""

from foldkv.cli.main import main

main()
