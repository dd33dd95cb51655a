"""python -m cachefs"""

from cachefs.cli import main

main(prog_name="cachefs")
