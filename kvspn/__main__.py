"""`python -m kvspn`: the command line."""

from kvspn.cli import app

if __name__ == "__main__":  # worker processes import this module too
    app(prog_name="kvspn")
