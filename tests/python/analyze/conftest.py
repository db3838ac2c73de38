from command import plain_terminal, source, text  # noqa: F401  fixtures
