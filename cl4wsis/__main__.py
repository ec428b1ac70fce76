"""Run the command line with ``python -m cl4wsis``."""

from cl4wsis.cli.main import run

if __name__ == "__main__":
    run()
