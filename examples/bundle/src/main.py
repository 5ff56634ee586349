"""Print the check digit of every number on standard input, one number per line."""
import sys

from reader import read_numbers
from luhn import compute_check_digit
from report import format_result
from legacy import compute_check_digit_by_table
from trace import trace


def main():
    """Read, compute, print."""
    for number in read_numbers(sys.stdin):
        trace("number", number)
        check_digit = compute_check_digit(number)
        sys.stdout.write(format_result(check_digit))


main()
