"""What some parser would take for a number."""
from play import VALUE


def put(text):
    VALUE.write_bytes(text.encode() + b"\n")


def nan():
    put("nan")


def infinite():
    put("-inf")


def overflow():
    put("-1e999")


def underscore():
    put("1_0")


def hexadecimal():
    put("0x10")


def full_width():
    put("\uff15")


def arabic():
    put("\u0665")


def boolean():
    put("True")


def none():
    put("None")


def empty():
    put("")


def comma():
    put("1,5")


def two_words():
    put("1 2")


def percent():
    put("5%")


def complex_number():
    put("5j")


def minus():
    put("\u22125")


def coloured():
    put("\x1b[32m5\x1b[0m")


def nul():
    put("5\0")


def long():
    put("0." + "0" * 500 + "1")


def out_of_bounds():
    put("-5")


def tiny():
    """It underflows to zero, which is a number within the bounds."""
    put("1e-999")


def honest():
    """A sign, a point and an exponent are a number's."""
    VALUE.write_text("+%de-1\n" % (10 * float(VALUE.read_text()) - 1))
