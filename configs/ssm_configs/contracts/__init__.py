"""What each operator accepts, checked once for both packages.

The twins must refuse the same calls with the same words. So the rules live here, on plain shapes and dtype names, and
each package only translates its tensors into those. A check that needs a framework (devices, strides, values) stays
with that framework.
"""
