"""Speed: `python -m benchmarks run | tune | plot`. An operator takes part through one declaration in `ops/`."""
