"""Messages for debugging."""

ENABLED = False


def trace(label, value):
    """Show a value while somebody is looking for a bug."""
    if ENABLED:
        print("trace:", label, repr(value))
