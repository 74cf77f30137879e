"""Benchmarks: tables of times and ratios that were all measured in one run, on this machine; `cli` lists them."""
