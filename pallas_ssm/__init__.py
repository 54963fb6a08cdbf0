"""JAX state-space operators; the twin of `triton_ssm`."""
