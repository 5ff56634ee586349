"""The table-driven variant of the first release; nothing calls it any more."""

DOUBLED = {0: 0, 1: 2, 2: 4, 3: 6, 4: 8, 5: 1, 6: 3, 7: 5, 8: 7, 9: 9}


def compute_check_digit_by_table(digits):
    """Return the digit that makes the whole number valid."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        total += digit if position % 2 else DOUBLED[digit]
    return -total % 10
