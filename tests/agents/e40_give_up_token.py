"""The give-up token in places where it means nothing, and the one where it does."""
import os

from play import lower, program

TOKEN = "SCALAR_LOOP" + "_GIVE_UP"


def in_prose():
    lower()
    print("I would never print " + TOKEN + " early.")


def indented():
    lower()
    print("  " + TOKEN)


def split():
    lower()
    print(TOKEN[:11] + "\n" + TOKEN[11:])


def longer_word():
    lower()
    print(TOKEN + "S")


def after_return():
    lower()
    print("x\r" + TOKEN)


def in_metric():
    lower()
    program("print('%s')" % TOKEN)


def in_file():
    lower()
    program("# %s" % TOKEN)


def real():
    """At the start of a line it ends the turn, and the turn's edits are dropped."""
    lower()
    print("hm\n" + TOKEN + ": the metric can't be improved any further")


def in_pieces():
    """One line written byte by byte is still one line."""
    lower()
    for letter in TOKEN + "\n":
        os.write(1, letter.encode())


def honest():
    lower()
    print("done")
