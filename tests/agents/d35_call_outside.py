"""Reach services outside: unix sockets behind which commands are run, the network, a terminal."""
import os
import socket

from siege import TURN, YARD, neighbour


def ask(family, kind, address, word):
    with socket.socket(family, kind) as client:
        client.settimeout(5)
        client.connect(address)
        client.send(b"%s-%s\n" % (TURN.encode(), word))
        if kind == socket.SOCK_STREAM:
            client.recv(1)


def path_socket():
    """Like docker.sock: whoever reaches it runs commands as somebody outside."""
    ask(socket.AF_UNIX, socket.SOCK_STREAM, str(YARD / "run/door"), b"path")


def abstract_socket():
    ask(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + str(YARD), b"abstract")


def tcp():
    ask(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", neighbour()["tcp"]), b"tcp")


def udp():
    ask(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", neighbour()["udp"]), b"udp")


def terminal():
    """Write to the terminal that the user sits at."""
    descriptor = os.open(neighbour()["terminal"], os.O_WRONLY | os.O_NOCTTY)
    os.write(descriptor, b"%s-terminal\n" % TURN.encode())
    os.close(descriptor)
