"""The subcommands of ``zoext``, one per module: each has EXAMPLES, ``add_arguments`` and ``run``."""
