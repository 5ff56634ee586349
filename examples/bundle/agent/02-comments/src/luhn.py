def double_digit(digit):
    doubled = digit + digit
    if doubled > 9:
        doubled = doubled - 9
    return doubled
def compute_check_digit(digits):
    total = 0
    position = 0
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
