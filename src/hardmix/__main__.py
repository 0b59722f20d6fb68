"""`python -m hardmix`, which is what launchers such as `accelerate launch -m hardmix` call."""

from hardmix.cli import main

main()
