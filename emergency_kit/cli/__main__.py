"""`python -m emergency_kit.cli VERB`."""

from emergency_kit.cli import main

if __name__ == "__main__":
    main()
