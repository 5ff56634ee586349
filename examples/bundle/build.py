"""Bundle the program into dist/bundle.py and print how many bytes that is: the metric.

Sealed, like everything outside src/: the agent can read this file, but not change it.
"""
import json
from pathlib import Path

import bundler

HERE = Path(__file__).resolve().parent


def build() -> Path:
    """Write dist/bundle.py and dist/sizes.json (bytes per module); return the bundle's path.

    Exits with 1 where src/ holds a file that no import leads to: what isn't counted isn't there.
    """
    modules = bundler.collect(HERE / "src", "main")
    bundled = {HERE / "src" / f"{name}.py" for name in modules}
    for file in (HERE / "src").rglob("*"):
        if not file.is_dir() and file not in bundled:
            raise SystemExit(f"{file.name} is not part of the program: import it or delete it")
    dist = HERE / "dist"
    dist.mkdir(exist_ok=True)
    bundle = dist / "bundle.py"
    bundle.write_bytes(b"".join(modules.values()))
    sizes = {name: len(source) for name, source in modules.items()}
    (dist / "sizes.json").write_text(json.dumps(sizes, indent=2), encoding="ascii")
    return bundle


if __name__ == "__main__":
    size = build().stat().st_size
    print(f"METRIC bytes={size}")
