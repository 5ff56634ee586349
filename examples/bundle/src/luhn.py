"""The Luhn algorithm, as on credit cards (ISO/IEC 7812-1, annex B)."""


def double_digit(digit):
    """Return the digit sum of twice the digit: 7 gives 14, and that gives 5."""
    doubled = digit + digit
    if doubled > 9:
        doubled = doubled - 9
    return doubled


def compute_check_digit(digits):
    """Return the digit that makes the whole number valid."""
    total = 0
    position = 0
    # From the right, every second digit is doubled, beginning with the last one.
    for digit in reversed(digits):
        if position % 2 == 0:
            total = total + double_digit(digit)
        else:
            total = total + digit
        position = position + 1
    remainder = total % 10
    if remainder == 0:
        return 0
    return 10 - remainder
