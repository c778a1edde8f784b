"""`python -m fused_resnet` is the command `fused-resnet`."""

from fused_resnet.cli import main

if __name__ == "__main__":
    main()
