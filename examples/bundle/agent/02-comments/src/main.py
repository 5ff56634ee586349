import sys
from reader import read_numbers
from luhn import compute_check_digit
from report import format_result
def main():
    for number in read_numbers(sys.stdin):
        check_digit = compute_check_digit(number)
        sys.stdout.write(format_result(check_digit))
main()
