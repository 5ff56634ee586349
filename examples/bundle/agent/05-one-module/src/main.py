def double_digit(digit):
    return digit * 2 - 9 if digit > 4 else digit * 2
for line in open(0):
    total = 0
    for position, digit in enumerate(map(int, reversed(line.strip()))):
        total += digit if position % 2 else double_digit(digit)
    print(-total % 10)
