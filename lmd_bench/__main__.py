"""`python -m lmd_bench` is `lmd-bench`."""

from lmd_bench.cli import main

main()
