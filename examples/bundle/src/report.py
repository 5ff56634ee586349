"""Writing of the output."""


def format_result(check_digit):
    """Return the line to print for a check digit."""
    return "{}\n".format(check_digit)
