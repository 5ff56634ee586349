def read_numbers(stream):
    numbers = []
    for line in stream:
        digits = []
        for character in line:
            if character in "0123456789":
                digits.append(int(character))
        numbers.append(digits)
    return numbers
