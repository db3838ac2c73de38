"""Bridges to other libraries. None of them is imported by `import octavo`."""
