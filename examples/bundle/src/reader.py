"""Reading of the input."""


def read_numbers(stream):
    """Return the digits of each line as a list of integers."""
    numbers = []
    for line in stream:
        digits = []
        for character in line:
            # The line end is no digit.
            if character in "0123456789":
                digits.append(int(character))
        numbers.append(digits)
    return numbers
