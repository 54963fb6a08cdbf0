"""How kernels are compiled whose arrays all have the layout that they are loaded in."""

from jax.experimental.pallas import mosaic_gpu as plgpu

BY_LANE = plgpu.CompilerParams(
    # A thread reads only what it has written itself, what a barrier has announced, or what was committed before.
    unsafe_no_auto_barriers=True,
    approx_math=True,
    # To infer layouts takes as long as all else.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)
