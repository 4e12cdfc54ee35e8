"""`python -m cadtrain`: the same command line, for launchers that start modules."""

from cadtrain.cli.app import main

if __name__ == "__main__":
    main()
