"""Subcommands of `python -m streamllm`: one file each, with `HELP`, `add_arguments(parser)` and `run(arguments)`."""
