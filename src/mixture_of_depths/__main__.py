"""`python -m mixture_of_depths` is the command `mod`, as `torchrun -m` needs it."""

from mixture_of_depths.cli.main import main

if __name__ == "__main__":
    main()
