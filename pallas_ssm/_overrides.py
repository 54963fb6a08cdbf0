"""Makes `ssm_configs.override` part of what `jax.jit` caches by: a jitted function is traced anew under another override."""

import jax

import ssm_configs

_context = jax.make_user_context(default_value=None)
ssm_configs.on_override(_context)


def check_override() -> None:
    """RuntimeError where the override in force is not the one that `jax.jit` knows of.

    That can only be when a context variable was carried to another thread, where JAX's own context did not follow.
    """
    if ssm_configs.override_token() != _context.value:
        raise RuntimeError(
            "override: the one in force is unknown to jax.jit, which would reuse programs compiled without it; enter "
            "override(...) in the thread that calls the function"
        )
