"""Proof that `pallas_ssm` and `triton_ssm` agree with a float64 oracle and with each other.

`python -m parity_tests` prints the report; the `test_*.py` files hold the checks that run without a GPU and, marked
`gpu`, those that need one.
"""
