"""`python -m maskhooks`."""

from maskhooks.cli import main

if __name__ == "__main__":
    main()
