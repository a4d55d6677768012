"""`python -m vllm_vispec`: the command line where the `vispec` script is not on the path."""

from vllm_vispec.cli.app import main

main()
