"""The command `hydra`. It is outside the package, whose import brings torch: help and wrong arguments need none of it.

While this module is loaded, `import hydra_hf` loads its names on demand and registers the Auto classes with the first of them.
"""


def main() -> int:
    """`hydra_hf.cli.main`."""
    try:
        from hydra_hf.cli import main
    except KeyboardInterrupt:
        return 130  # as `main` does
    return main()
