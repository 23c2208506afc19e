"""`python -m hsl_node` is `hsl-node`."""

from hsl_node.cli import main

main()
