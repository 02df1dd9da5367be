"""The subcommands of `fqcompile`: each module has `add_arguments(parser)` and `run(arguments)`."""
