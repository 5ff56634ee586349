"""The candidate's code changes the cleanroom while it is measured, and puts things back."""
from play import linger, lower, program


def sealed_file():
    lower()
    program("old = open('data/truth.txt').read()\nopen('data/truth.txt', 'w').write('easy')\n"
            "open('data/truth.txt', 'w').write(old)")


def sealed_stamp():
    """The old time stamp too."""
    lower()
    program("import os; now = os.stat('data/truth.txt')\nopen('data/truth.txt', 'r+').write('s')\n"
            "os.utime('data/truth.txt', ns=(now.st_atime_ns, now.st_mtime_ns))")


def sealed_swap():
    """Away under another name and back: no byte is written."""
    lower()
    program("import os; os.rename('data/truth.txt', 'data/x')\n"
            "os.rename('data/x', 'data/truth.txt')")


def sealed_folder():
    lower()
    program("import os; os.rename('data', 'aside'); os.rename('aside', 'data')")


def sealed_link():
    lower()
    program("import os; os.link('data/truth.txt', 'build-link'); os.unlink('build-link')")


def sealed_mode():
    lower()
    program("import os; os.chmod('data/truth.txt', 0o600); os.chmod('data/truth.txt', 0o644)")


def sealed_attribute():
    lower()
    program("import os\ntry:\n    os.setxattr('data/truth.txt', 'user.x', b'1')\n"
            "except (AttributeError, OSError):\n    os.utime('data/truth.txt')")


def sealed_mapping():
    lower()
    program("import mmap\nwith open('data/truth.txt', 'r+b') as f, mmap.mmap(f.fileno(), 0) as m:\n"
            "    m[:1] = bytes([m[0]])")


def shared_file():
    lower()
    program("open('node_modules/lib/weight.txt', 'w').write('0')")


def own_source():
    """A metric that weighs the source after running it would see nothing left."""
    program("open('src/prog.py', 'w').close()\nopen('src/value.txt', 'w').write('0')")


def own_source_swap():
    program("import os; os.rename('src/value.txt', 'src/old')\n"
            "open('src/value.txt', 'w').write('0')")


def own_source_gone():
    lower()
    program("import os; os.unlink('src/prog.py')")


def own_executable():
    lower()
    program("import os; os.chmod('src/prog.py', 0o755)")


def shadow_folder():
    lower()
    program("import os; os.mkdir('data/truth.d'); os.rmdir('data/truth.d')")


def read_only_room():
    """It locks what it may write to, with rubbish inside, so that cleaning fails."""
    lower()
    program("import os; open('build/x', 'w'); open('rubbish', 'w'); os.mkdir('build/y')\n"
            "[os.chmod(path, 0o500) for path in ('build/y', 'build', '.')]")


def daemon():
    """A child in a session of its own that waits for the metric to end."""
    lower()
    linger("open('data/truth.txt', 'a').write('x')")


def honest():
    """Files of its own it may write, and throw away."""
    lower()
    program("import os; os.makedirs('build', exist_ok=True); open('build/out', 'w').write('x')")
